"""A product of a few rows with a 16-bit weight on a CPU, as each step of generation makes them: ``W x^T``, which reads W as it lies.

F.linear rearranges a 16-bit W for every product, which for a few rows takes as long as the product itself.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

FEW_ROWS = 32  # up to which reading the weight is what a product costs


def are_few(x: Tensor) -> bool:
    """Whether `linear` has another way for these rows than F.linear: not many, in 16 bit, on a CPU, without gradients."""
    if x.dtype != torch.bfloat16 or not x.is_cpu or x.numel() > FEW_ROWS * x.shape[-1]:
        return False
    return not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear: [..., in] -> [..., out], for weights of x's dtype."""
    if not are_few(x):
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    y = torch.mv(weight, rows[0])[None] if len(rows) == 1 else torch.mm(weight, rows.mT).mT
    return y.reshape(*x.shape[:-1], -1) if bias is None else y.reshape(*x.shape[:-1], -1) + bias

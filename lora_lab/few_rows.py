"""A product of a few rows with a 16-bit weight on a CPU, as each step of generation makes them: ``W x^T``, which reads W as it lies.

F.linear rearranges a 16-bit W for every product, which for a few rows takes as long as the product itself.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .autocast import autocast_dtype, is_eager

FEW_ROWS = 32  # up to which reading the weight is what a product costs


def are_few(x: Tensor) -> bool:
    """Whether `product` is for these rows: not many, in 16 bit, on a CPU, without gradients."""
    if x.dtype != torch.bfloat16 or not x.is_cpu or x.numel() > FEW_ROWS * x.shape[-1]:
        return False
    return not torch.is_grad_enabled() and is_eager() and autocast_dtype(x) in (None, x.dtype)


def suits(weight: Tensor, x: Tensor) -> bool:
    """Whether `product` is for this weight: of x's dtype, and an ordinary tensor."""
    return weight.dtype == x.dtype and type(weight) in (nn.Parameter, Tensor)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear, by `product` where it is for that: [..., in] -> [..., out]."""
    return product(x, weight, bias) if are_few(x) and suits(weight, x) else F.linear(x, weight, bias)


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear of a few rows, and laid out like it."""
    rows = x.reshape(-1, x.shape[-1])
    y = torch.mv(weight, rows[0]) if len(rows) == 1 else torch.mm(weight, rows.mT).mT.contiguous()
    y = y.view(*x.shape[:-1], len(weight))
    return y if bias is None else y.add_(bias)

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
    """Whether `product` is for these rows here: no gradients, and nothing that rewrites or casts."""
    return not torch.is_grad_enabled() and fit(x) and is_eager() and autocast_dtype(x) in (None, x.dtype)


def fit(x: Tensor) -> bool:
    """Whether `product` is for such rows: not many, in 16 bit, on a CPU."""
    return x.dtype == torch.bfloat16 and x.is_cpu and x.numel() <= FEW_ROWS * x.shape[-1]


def suits(weight: Tensor, x: Tensor) -> bool:
    """Whether `product` is for this weight: of x's dtype, and an ordinary tensor."""
    return weight.dtype == x.dtype and type(weight) in (nn.Parameter, Tensor)


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear, and laid out like it."""
    if not fit(x):
        return F.linear(x, weight, bias)
    y = of_one(x, weight) if is_one(x) else torch.mm(weight, x.reshape(-1, x.shape[-1]).mT).mT.contiguous()
    y = y.view(*x.shape[:-1], weight.shape[0])
    return y if bias is None else y.add_(bias)


def adapted(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float,
            cast: Tensor) -> Tensor:
    """``W x + bias + scaling * B A x``. cast: x in A's dtype, for which A and B would be the more to cast."""
    update = torch.mv(B, of_one(cast, A)) if is_one(cast) else F.linear(F.linear(cast, A), B)
    return product(x, weight, bias).add_(update, alpha=scaling)


def is_one(x: Tensor) -> bool:
    return x.numel() == x.shape[-1]


def of_one(x: Tensor, weight: Tensor) -> Tensor:
    """``W x`` of a single row, which may have any shape: [..., in] -> [out]."""
    return torch.mv(weight, x.reshape(-1))

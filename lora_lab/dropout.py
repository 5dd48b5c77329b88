"""``scaling * B A dropout(x)`` that keeps x, A, B and one bit per element.

Left to autograd, dropout keeps a mask and the dropped copy of x for every adapted layer; q, k and v, which read one x, then keep three of
each. Here x is kept once for all of them, the mask is packed into bits, and backward drops x again.
Source of the gradients: Hu et al. 2021 (arXiv:2106.09685), equation 3, by the chain rule.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .autocast import autocast_dtype
from .functions import applied
from .rematerialize import rows


def dropped_update(x: Tensor, A: Tensor, B: Tensor, scaling: float, share: float) -> Tensor:
    """x: [..., in], A: [r, in], B: [out, r], all of one dtype. share: of x's elements that are dropped; the others are divided by 1 - share."""
    if (dtype := autocast_dtype(x)) is not None:
        x, A, B = (tensor.to(dtype) for tensor in (x, A, B))
    kept = torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1 - share)
    result: Tensor = applied(_DroppedUpdate, x, A, B, pack(kept), scaling, 1 / (1 - share))
    return result


def pack(mask: Tensor) -> Tensor:
    """Eight booleans to a byte: [...] -> [ceil(n / 8)] of uint8.

    >>> unpack(pack(torch.tensor([True, False, True])), torch.Size([3]))
    tensor([ True, False,  True])
    """
    flat = mask.flatten().view(torch.uint8)
    flat = torch.cat((flat, flat.new_zeros(-flat.numel() % 8))).view(-1, 8)
    packed = flat[:, 0].clone()
    for bit in range(1, 8):
        packed |= flat[:, bit] << bit
    return packed


def unpack(packed: Tensor, shape: torch.Size) -> Tensor:
    """The booleans again, [shape]."""
    bits = torch.arange(8, device=packed.device, dtype=torch.uint8)
    return ((packed[:, None] >> bits) & 1).flatten()[: shape.numel()].view(shape).bool()


class _DroppedUpdate(torch.autograd.Function):
    """y = s B A (x * m), with m the mask divided by the share that is kept."""

    @staticmethod
    def forward(x: Tensor, A: Tensor, B: Tensor, packed: Tensor, scaling: float, grow: float) -> Tensor:
        return (scaling * (_drop(x, packed, grow) @ A.T)) @ B.T

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, A, B, packed, ctx.scaling, ctx.grow = inputs
        ctx.save_for_backward(x, A, B, packed)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x, A, B, packed), grad = ctx.saved_tensors, grads[0]
        dropped, through_B = _drop(x, packed, ctx.grow), ctx.scaling * (grad @ B)
        grad_x = _drop(through_B @ A, packed, ctx.grow) if ctx.needs_input_grad[0] else None
        grad_A = rows(through_B).T @ rows(dropped) if ctx.needs_input_grad[1] else None
        grad_B = ctx.scaling * rows(grad).T @ rows(dropped @ A.T) if ctx.needs_input_grad[2] else None
        return grad_x, grad_A, grad_B, None, None, None


def _drop(x: Tensor, packed: Tensor, grow: float) -> Tensor:
    return torch.where(unpack(packed, x.shape), x * grow, 0)

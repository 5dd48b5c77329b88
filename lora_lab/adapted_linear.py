"""``W x + scaling * B A x`` of a frozen nn.Linear in one autograd Function: the same numbers, fewer passes over memory.

Written as a sum, the layer's output is made three times (W x, the update, their sum), and so is the gradient of x. Here the small products are
added in place into the large ones, which is most of what LoRA costs beside the frozen model; kept for backward are x, A, B and A x as before. A
LoRA layer takes this way for one plain adapter on a layer of one dtype; the sum in layers.py is what it means, and a test holds the two together.
Source of the gradients: Hu et al. 2021 (arXiv:2106.09685), equation 3, by the chain rule.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import few_rows
from .autocast import autocast_dtype
from .remade import recipe_of


def is_simple(layer: Any, x: Tensor) -> bool:
    """Whether `adapted_linear` computes what a LoRA layer on nn.Linear does: a frozen dense weight, and no cast on the way."""
    weight, bias = layer.weight, layer.bias
    frozen = not (weight.requires_grad or (bias is not None and bias.requires_grad))
    dense = type(weight) in (nn.Parameter, Tensor) and type(x) in (nn.Parameter, Tensor)
    return frozen and dense and weight.dtype == x.dtype and autocast_dtype(x) in (None, x.dtype) and not torch.compiler.is_compiling()


def adapted_linear(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """x: [..., in], weight: [out, in], A: [r, in], B: [out, r] -> [..., out], in x's and the weight's dtype.

    Of x and A the smaller one is cast: A and B in a step of training, in one of generation the few tokens' x.
    """
    if not torch.is_grad_enabled() and x.numel() <= A.numel():
        return few_rows.linear(x, weight, bias).add_(F.linear(F.linear(x.to(A.dtype), A), B), alpha=scaling)
    A, B = A.to(x.dtype), B.to(x.dtype)
    if not torch.is_grad_enabled():
        return _AdaptedLinear.forward(x, weight, bias, A, B, scaling, None)[0]
    make, sources = recipe_of(x) or (None, ())
    result: Tensor = _AdaptedLinear.apply(x, weight, bias, A, B, scaling, make, *sources)[0]
    return result


class _AdaptedLinear(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float, make: Any,
                *sources: Tensor) -> tuple[Tensor, Tensor]:  # fmt: skip
        y, low = F.linear(x, weight, bias), scaling * F.linear(x, A)
        y.view(-1, len(B)).addmm_(_rows(low), B.T)
        return y, low

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, weight, _, A, B, ctx.scaling, ctx.make, *sources = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(weight, A, B, output[1], *(sources if ctx.make else [x]))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (weight, A, B, low, *sources), grad = ctx.saved_tensors, grads[0]
        if grad is None:
            return (None,) * (7 + len(sources) * bool(ctx.make))
        x = _again(ctx.make, sources) if ctx.needs_input_grad[3] or torch.is_grad_enabled() else None
        if torch.is_grad_enabled():  # second derivatives go through A x, too
            low = ctx.scaling * F.linear(x, A)  # type: ignore[arg-type]
        through_B = ctx.scaling * (grad @ B)
        grad_A = _rows(through_B).T @ _rows(x) if ctx.needs_input_grad[3] and x is not None else None
        x = None  # made again, it need not stay beside its gradient
        grad_B = (_rows(low).T @ _rows(grad)).T if ctx.needs_input_grad[4] else None  # this way round is the faster one
        grad_x = grad @ weight if ctx.needs_input_grad[0] else None
        if grad_x is not None:
            grad_x.view(-1, A.shape[1]).addmm_(_rows(through_B), A)
        return grad_x, None, None, grad_A, grad_B, None, None, *(None for _ in sources if ctx.make)


def _again(make: Callable[..., Tensor] | None, sources: list[Tensor]) -> Tensor:
    return sources[0] if make is None else make(*sources)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])

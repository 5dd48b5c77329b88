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
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from . import few_rows
from .autocast import autocast_dtype, is_eager, outside_autocast
from .functions import applied
from .remade import recipe_of, rows

PLAIN = (nn.Parameter, Tensor, FakeTensor)  # no other subclass: it may have rules of its own


def is_simple(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor) -> bool:
    """Whether `adapted_linear` computes what a LoRA layer on nn.Linear does: a frozen dense weight, no cast on the way, nothing but autograd.

    Where gradients are wanted but none of A, the sum need not keep x, and is better.
    """
    frozen = not (weight.requires_grad or (bias is not None and bias.requires_grad))
    dense = type(weight) in PLAIN and type(x) in PLAIN and x.is_floating_point() and not x.is_nested
    cast = weight.dtype != x.dtype or autocast_dtype(x) not in (None, x.dtype)
    return is_eager() and frozen and dense and not cast and (A.requires_grad or not torch.is_grad_enabled()) and _may_add_in_place()


def _may_add_in_place() -> bool:
    """Selective checkpointing keeps results of operations, and refuses what is changed afterwards."""
    return not torch._C._len_torch_dispatch_stack() or all(
        type(mode).__module__ != "torch.utils.checkpoint" for mode in _get_current_dispatch_mode_stack()
    )


def adapted_linear(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """x: [..., in], weight: [out, in], A: [r, in], B: [out, r] -> [..., out], in x's and the weight's dtype.

    Of x and A the smaller one is cast: A and B in a step of training, in one of generation the few tokens' x, where A is no narrower.
    """
    if not torch.is_grad_enabled() and x.numel() <= A.numel() and torch.promote_types(x.dtype, A.dtype) == A.dtype:
        return few_rows.adapted(x, weight, bias, A, B, scaling, x.to(A.dtype))
    A, B = A.to(x.dtype), B.to(x.dtype)
    recipe = recipe_of(x)
    make, sources = (recipe.make, recipe.sources) if recipe else (None, ())
    result: Tensor = applied(_AdaptedLinear, x, weight, bias, A, B, scaling, make, *sources)[0]
    return result


class _AdaptedLinear(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float, make: Any,
                *sources: Tensor) -> tuple[Tensor, Tensor]:  # fmt: skip
        x, shape = rows(x), [*x.shape[:-1], len(weight)]
        low = scaling * F.linear(x, A)
        y = F.linear(x, weight, bias).addmm_(low, B.T)
        return torch.ops.aten._unsafe_view(y, shape), low  # a view could not be changed in place by who gets it

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, weight, _, A, B, ctx.scaling, ctx.make, *sources = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(weight if ctx.needs_input_grad[0] else None, A, B, output[1], *(sources if ctx.make else [x]))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (weight, A, B, low, *sources), grad = ctx.saved_tensors, grads[0]
        if grad is None:
            return (None,) * (7 + len(sources) * bool(ctx.make))
        with outside_autocast(grad):
            return *_gradients(ctx, rows(grad), grad.shape[:-1], weight, A, B, low, sources), None, None, *(None for _ in sources if ctx.make)


def _gradients(
    ctx: Any, grad: Tensor, shape: torch.Size, weight: Tensor | None, A: Tensor, B: Tensor, low: Tensor, sources: list[Tensor]
) -> tuple[Tensor | None, ...]:
    """Of x, W, the bias, A, B and the scaling. grad: [rows, out], where x is [*shape, in]."""
    x = rows(_again(ctx.make, sources)) if ctx.needs_input_grad[3] or torch.is_grad_enabled() else None
    if torch.is_grad_enabled() and x is not None:  # second derivatives go through A x, too
        low = ctx.scaling * F.linear(x, A)
    through_B = ctx.scaling * (grad @ B)
    grad_A = through_B.T @ x if ctx.needs_input_grad[3] and x is not None else None
    x = None  # made again, it need not stay beside its gradient
    grad_B = (low.T @ grad).T if ctx.needs_input_grad[4] else None  # this way round is the faster one
    grad_x = None if weight is None else (grad @ weight).addmm_(through_B, A).view(*shape, A.shape[1])
    return grad_x, None, None, grad_A, grad_B, None


def _again(make: Callable[..., Tensor] | None, sources: list[Tensor]) -> Tensor:
    return sources[0] if make is None else make(*sources)

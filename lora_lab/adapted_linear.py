"""``W x + scaling * B A x`` of a frozen nn.Linear, or of several with one x, in an autograd Function: the same numbers, fewer passes over memory.

Written as a sum, the layer's output is made three times (W x, the update, their sum), and so is the gradient of x. Here the small products are
added in place into the large ones, which is most of what LoRA costs beside the frozen model; kept for backward are x, A, B and A x as before. A
LoRA layer takes this way for one plain adapter on a layer of one dtype; the sum in layers.py is what it means, and a test holds the two together.
Source of the gradients: Hu et al. 2021 (arXiv:2106.09685), equation 3, by the chain rule.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from . import few_rows
from .autocast import autocast_dtype, is_eager, outside_autocast
from .functions import applied
from .rematerialize import recipe_of, rows

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
    return adapted_linears(x, [(weight, bias, A, B)], [scaling])[0]


Layer = tuple[Tensor, "Tensor | None", Tensor, Tensor]  # W [out, in], bias [out], A [r, in], B [out, r]


def adapted_linears(x: Tensor, layers: Sequence[Layer], scalings: Sequence[float]) -> list[Tensor]:
    """What several layers make of one x, as q, k and v do. All their A read x at once, and its gradient is written in one place."""
    recipe = recipe_of(x)
    make, sources = (recipe.make, recipe.sources) if recipe else (None, ())
    tensors = [tensor for weight, bias, A, B in layers for tensor in (weight, bias, A.to(x.dtype), B.to(x.dtype))]
    return list(applied(_AdaptedLinears, x, make, scalings, *tensors, *sources)[: len(layers)])


class _AdaptedLinears(torch.autograd.Function):
    """Its inputs behind the scalings: W, bias, A, B of every layer, and what x is made of. Its outputs: every y, and every scaling * A x."""

    @staticmethod
    def forward(x: Tensor, make: Any, scalings: Sequence[float], *tensors: Any) -> tuple[Tensor, ...]:
        weights, biases, As, Bs = _by_kind(tensors, len(scalings))
        x, shape = rows(x), x.shape[:-1]
        lows = _lows(x, As, scalings)
        ys = [F.linear(x, weight, bias).addmm_(low, B.T) for weight, bias, low, B in zip(weights, biases, lows, Bs, strict=True)]
        return *(torch.ops.aten._unsafe_view(y, [*shape, y.shape[1]]) for y in ys), *lows  # views could not be changed in place by who gets them

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, ctx.make, ctx.scalings, *tensors = inputs
        count = len(ctx.scalings)
        weights, _, As, Bs = _by_kind(tensors, count)
        ctx.shape = x.shape
        ctx.mark_non_differentiable(*output[count:])
        ctx.set_materialize_grads(False)
        weights = weights if ctx.needs_input_grad[0] else [None] * count
        ctx.save_for_backward(*weights, *As, *Bs, *output[count:], *(tensors[4 * count :] if ctx.make else [x]))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        count, given = len(ctx.scalings), len(ctx.needs_input_grad)
        if all(grad is None for grad in grads):
            return (None,) * given
        saved = ctx.saved_tensors  # asked once: under checkpointing that makes them
        weights, As, Bs, lows = (saved[count * i : count * (i + 1)] for i in range(4))
        filled = [B.new_zeros(len(low), len(B)) if grad is None else rows(grad) for grad, low, B in zip(grads, lows, Bs, strict=False)]
        with outside_autocast(As[0]):
            grad_x, grad_As, grad_Bs = _gradients(ctx, filled, weights, As, Bs, lows, saved[4 * count :])
        of_layers = [grad for pair in zip(grad_As, grad_Bs, strict=True) for grad in (None, None, *pair)]
        return grad_x, None, None, *of_layers, *[None] * (given - 3 - 4 * count)


def _by_kind(tensors: Sequence[Any], count: int) -> list[list[Any]]:
    """The weights, the biases, the A and the B of so many layers."""
    return [list(tensors[kind : 4 * count : 4]) for kind in range(4)]


def _lows(x: Tensor, As: Sequence[Tensor], scalings: Sequence[float]) -> list[Tensor]:
    """``scaling * A x`` of each layer, [rows, r]."""
    parts = F.linear(x, _joined(As, 0)).split([len(A) for A in As], 1)
    return [scaling * part for scaling, part in zip(scalings, parts, strict=True)]


def _joined(tensors: Sequence[Tensor], dim: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim)


Gradients = Sequence["Tensor | None"]


def _gradients(ctx: Any, grads: Sequence[Tensor], weights: Sequence[Tensor | None], As: Sequence[Tensor], Bs: Sequence[Tensor],
               lows: Sequence[Tensor], sources: Sequence[Tensor]) -> tuple[Tensor | None, Gradients, Gradients]:  # fmt: skip
    """Of x, of every A and of every B. grads: [rows, out] each."""
    wants_A, wants_B = (any(ctx.needs_input_grad[3 + kind : 3 + 4 * len(As) : 4]) for kind in (2, 3))
    x = rows(_again(ctx.make, sources)) if wants_A or torch.is_grad_enabled() else None
    if torch.is_grad_enabled() and x is not None:  # second derivatives go through A x, too
        lows = _lows(x, As, ctx.scalings)
    through = _joined([scaling * (grad @ B) for scaling, grad, B in zip(ctx.scalings, grads, Bs, strict=True)], 1)
    grad_As = (through.T @ x).split([len(A) for A in As]) if wants_A and x is not None else [None] * len(As)
    x = None  # made again, it need not stay beside its gradient
    grad_Bs = [(low.T @ grad).T if wants_B else None for low, grad in zip(lows, grads, strict=True)]  # this way round is the faster one
    return _gradient_of_x(grads, weights, through, As, ctx.shape), grad_As, grad_Bs


def _gradient_of_x(grads: Sequence[Tensor], weights: Sequence[Tensor | None], through: Tensor, As: Sequence[Tensor],
                   shape: torch.Size) -> Tensor | None:  # fmt: skip
    """The sum over the layers of ``grad W + scaling * grad B A``; through: scaling * grad B of all of them, [rows, sum of r]."""
    first, *others = weights
    if first is None:
        return None
    total = grads[0] @ first
    for grad, weight in zip(grads[1:], others, strict=True):
        total.addmm_(grad, weight)  # type: ignore[arg-type]
    return total.addmm_(through, _joined(As, 0)).view(shape)


def _again(make: Callable[..., Tensor] | None, sources: Sequence[Tensor]) -> Tensor:
    return sources[0] if make is None else make(*sources)

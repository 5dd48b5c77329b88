"""Inputs of LoRA layers that autograd need not keep: they can be made again from what it keeps anyway.

The gradient of A needs the layer's input x. Behind a gate, ``x = silu(gate) * up``, autograd has gate and up already, so that x, the widest
activation of a transformer, need not be kept beside them: backward makes it again, which is one pass over memory. The model says so where it
makes x; a LoRA layer that gets this very tensor acts on it, and everything else sees an ordinary tensor.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .autocast import autocast_dtype

Recipe = tuple[Callable[..., Tensor], tuple[Tensor, ...]]
_keeping: ContextVar[bool] = ContextVar("keeping", default=False)


def can_be_remade(x: Tensor, make: Callable[..., Tensor], *sources: Tensor) -> Tensor:
    """x, remembering that ``make(*sources)`` is x again, bit for bit, and that backward keeps the sources in any case. Returns x."""
    if not torch.compiler.is_compiling() and x.requires_grad and not _keeping.get():
        x.lora_recipe = make, sources  # type: ignore[attr-defined]
    return x


def recipe_of(x: Tensor) -> Recipe | None:
    """How x can be made again; None where nobody said."""
    return None if torch.compiler.is_compiling() else getattr(x, "lora_recipe", None)


@contextlib.contextmanager
def keeping_inputs() -> Iterator[None]:
    """Inside the block everything is kept as usual: where what is kept moves elsewhere, the sources would move twice."""
    token = _keeping.set(True)
    try:
        yield
    finally:
        _keeping.reset(token)


def product(x: Tensor, A: Tensor) -> Tensor:
    """``x A^T``: [..., in] and [r, in] -> [..., r]; keeps x's sources in place of x where it has some."""
    recipe = recipe_of(x)
    if recipe is None or not A.requires_grad or autocast_dtype(x) not in (None, x.dtype):
        return F.linear(x, A)
    result: Tensor = _Product.apply(x, A, recipe[0], *recipe[1])
    return result


class _Product(torch.autograd.Function):
    """``x A^T``, with x made again in backward."""

    @staticmethod
    def forward(x: Tensor, A: Tensor, make: Callable[..., Tensor], *sources: Tensor) -> Tensor:
        return F.linear(x, A)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, A, ctx.make, *sources = inputs
        ctx.save_for_backward(A, *sources)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (A, *sources), grad = ctx.saved_tensors, grads[0]
        grad_x = grad @ A if ctx.needs_input_grad[0] else None
        grad_A = grad.flatten(0, -2).mT @ ctx.make(*sources).flatten(0, -2) if ctx.needs_input_grad[1] else None
        return grad_x, grad_A, None, *(None for _ in sources)

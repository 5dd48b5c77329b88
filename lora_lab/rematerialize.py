"""Inputs of LoRA layers that autograd need not keep: they can be made again from what it keeps anyway.

The gradient of A needs the layer's input x. Behind a gate, ``x = silu(gate) * up``, autograd has gate and up already, so that x, the widest
activation of a transformer, need not be kept beside them: backward makes it again, which is one pass over memory. The model says so where it
makes x; a LoRA layer that gets this very tensor acts on it, and everything else sees an ordinary tensor. Second derivatives go through gate and
up, and not through x.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .autocast import autocast_dtype, is_eager, saved_tensor_hooks
from .functions import applied

_keeping: ContextVar[Any] = ContextVar("keeping", default=False)


class Recipe:
    """``make(*sources)``, of a tensor and its sources as they are now."""

    def __init__(self, x: Tensor, make: Callable[..., Tensor], sources: tuple[Tensor, ...]) -> None:
        self.make, self.sources = make, sources
        self.versions = _versions(x, *sources)

    def still_makes(self, x: Tensor) -> bool:
        """Nobody has changed x or a source in place."""
        return self.versions == _versions(x, *self.sources)

    def __reduce__(self) -> Any:
        """In a file a tensor is its numbers."""
        return set, ()


def rematerializable(x: Tensor, make: Callable[..., Tensor], *sources: Tensor) -> Tensor:
    """x, remembering that ``make(*sources)`` is x again, bit for bit, and that backward keeps the sources in any case. Returns x."""
    if x.requires_grad and is_eager() and _keeping.get() != saved_tensor_hooks():
        x.lora_recipe = Recipe(x, make, sources)  # type: ignore[attr-defined]
    return x


def recipe_of(x: Tensor) -> Recipe | None:
    """How x can be made again; None where nobody said, or x is no longer what was said."""
    recipe = getattr(x, "lora_recipe", None) if is_eager() else None
    return recipe if isinstance(recipe, Recipe) and recipe.still_makes(x) else None


@contextlib.contextmanager
def keeping_inputs() -> Iterator[None]:
    """Inside the block everything is kept as usual: where what is kept moves elsewhere, the sources would move twice.

    It is about the hooks on saved tensors that are set now. Those of checkpointing, which come on top, keep nothing; and backward, which may be
    outside the block, has to compute again what the forward pass did.
    """
    token = _keeping.set(saved_tensor_hooks())
    try:
        yield
    finally:
        _keeping.reset(token)


def linear_rematerialized(x: Tensor, A: Tensor) -> Tensor:
    """``x A^T``: [..., in] and [r, in] -> [..., r]; keeps x's sources in place of x where it has some."""
    recipe = recipe_of(x)
    if recipe is None or not A.requires_grad or autocast_dtype(x) not in (None, x.dtype):
        return F.linear(x, A)
    result: Tensor = applied(_LinearRematerialized, x, A, recipe.make, *recipe.sources)
    return result


class _LinearRematerialized(torch.autograd.Function):
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
        grad_A = rows(grad).T @ rows(ctx.make(*sources)) if ctx.needs_input_grad[1] else None
        return grad_x, grad_A, None, *(None for _ in sources)


def rows(x: Tensor) -> Tensor:
    """[..., n] as a matrix, [rows, n]."""
    return x.reshape(-1, x.shape[-1])


def _versions(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(tensor._version for tensor in tensors)

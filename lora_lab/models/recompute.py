"""Gradient checkpointing: keep less in forward, compute it again in backward (Chen et al. 2016, arXiv:1604.06174).

    True          every block keeps its input only
    n             so does every n-th block, beginning with the first
    "attention"   attention keeps q, k and v, and makes softmax(q k^T) v again (Korthikanti et al. 2022, arXiv:2205.05198, section 5)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..adapters import checkpoint_contexts
from ..errors import LoraLabError
from .cache import LayerCache

Mode = bool | int | str


def recomputed(module: nn.Module, run: Callable[..., Any], *inputs: Any) -> Any:
    """``run(*inputs)``, again in backward, with the adapters of `module` and the random numbers that this forward pass has.

    Each run gets a key-value cache as it is now, and what it adds is not kept.
    """

    def once(*inputs: Any) -> Any:
        return run(*(given.fork() if isinstance(given, LayerCache) else given for given in inputs))

    contexts: dict[str, Any] = {} if torch.compiler.is_compiling() else {"context_fn": lambda: checkpoint_contexts(module)}
    return checkpoint(once, *inputs, use_reentrant=False, **contexts)


class Recomputable(nn.Module):
    """A block of a model: `compute` is its forward pass, which checkpointing may run again."""

    recompute = False
    recompute_in_eval = False

    def compute(self, x: Tensor, *args: Any) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        return recomputed(self, self.compute, x, *args) if self.recomputes else self.compute(x, *args)

    @property
    def recomputes(self) -> bool:
        """Is checkpointing at work in a forward pass made now?"""
        return self.recompute and (self.training or self.recompute_in_eval) and torch.is_grad_enabled()


class RecomputableCore(nn.Module):
    """An attention whose core, softmax(q k^T) v, checkpointing may run again; `attend` asks."""

    recompute_core = False
    recompute_in_eval = False


def check_mode(mode: Any) -> None:
    """Raise LoraLabError for what is no mode of checkpointing."""
    if mode != "attention" and (not isinstance(mode, int) or mode < 0):
        raise LoraLabError(f"gradient_checkpointing={mode!r}: expected True, False, a number n (every n-th block), or 'attention'")


def set_recompute(model: nn.Module, mode: Mode) -> None:
    """Switch checkpointing on or off. Raises LoraLabError for a mode that is none."""
    check_mode(mode)
    blocks = [module for module in model.modules() if isinstance(module, Recomputable)]
    for index, block in enumerate(blocks):
        block.recompute = mode is True or (isinstance(mode, int) and mode > 0 and index % mode == 0)
    for module in model.modules():
        if isinstance(module, RecomputableCore):
            module.recompute_core = mode == "attention"


def recompute_mode(model: nn.Module) -> bool:
    """Whether any part of the model is recomputed in training."""
    return any(getattr(module, "recompute", False) or getattr(module, "recompute_core", False) for module in model.modules())


@contextlib.contextmanager
def recomputing_in_eval(model: nn.Module) -> Iterator[None]:
    """Inside the block checkpointing is at work in eval mode, too: dropout is off in a frozen model, but a prompt before it trains through it."""
    parts = [module for module in model.modules() if isinstance(module, (Recomputable, RecomputableCore))]
    try:
        for part in parts:
            part.recompute_in_eval = True
        yield
    finally:
        for part in parts:
            part.recompute_in_eval = False

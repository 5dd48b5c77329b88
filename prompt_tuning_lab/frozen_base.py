"""A frozen base under a prompt that trains: in eval mode, as its dropout would only add noise (trap T26), and yet gradients flow through it.

What training mode means besides dropout is switched on for the time of one call: our models make no logits where only the loss is
wanted, and gradient checkpointing works.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from lora_lab.errors import LoraLabError
from lora_lab.models.base import PretrainedModel
from lora_lab.models.recompute import recomputing_in_eval


@contextlib.contextmanager
def learning_through(base: nn.Module) -> Iterator[None]:
    """Around a forward pass whose gradients are for a prompt."""
    before, ours = base.training, isinstance(base, PretrainedModel)
    with _checkpointing(base):
        try:
            if ours:
                base.training = True  # the top module alone: it has no dropout of its own
            yield
        finally:
            base.training = before


def _checkpointing(base: nn.Module) -> contextlib.AbstractContextManager[None]:
    if not torch.is_grad_enabled():
        return contextlib.nullcontext()
    if isinstance(base, PretrainedModel):
        return recomputing_in_eval(base) if base.is_gradient_checkpointing else contextlib.nullcontext()
    blocks = [module for module in base.modules() if getattr(module, "gradient_checkpointing", False) is True and _is_layer(module)]
    return _blocks_in_training(base, blocks) if blocks else contextlib.nullcontext()


def _is_layer(module: nn.Module) -> bool:
    """transformers' blocks, known by name, as it is not imported here; each asks its own .training whether to be recomputed."""
    return any(each.__name__ == "GradientCheckpointingLayer" for each in type(module).__mro__)


@contextlib.contextmanager
def _blocks_in_training(base: nn.Module, blocks: list[nn.Module]) -> Iterator[None]:
    """The blocks alone, what is inside them stays in eval mode. Raises LoraLabError where a block draws dropout by the same switch."""
    _refuse_dropout(base, blocks[0])
    try:
        for block in blocks:
            block.training = True
        yield
    finally:
        for block in blocks:
            block.training = False


def _refuse_dropout(base: nn.Module, block: nn.Module) -> None:
    config: Any = getattr(base, "config", None)
    rates = {name: value for name, value in vars(config).items() if "drop" in name and isinstance(value, float) and value > 0}
    if rates and "training" in inspect.unwrap(type(block).forward).__code__.co_names:
        name, rate = next(iter(rates.items()))
        raise LoraLabError(f"gradient checkpointing in a {type(base).__name__} with {name}={rate}: its blocks draw dropout by the "
                           f"switch that checkpointing needs, and a frozen model's dropout is noise: build it with {name}=0.0")  # fmt: skip

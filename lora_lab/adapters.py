"""Which adapters take part: `use`, `disabled`, and the selection a checkpointed recompute has to see again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from torch import nn

from .errors import LoraLabError, did_you_mean
from .layers import LoRA
from .targets import adapter_names, lora_layers

Model = TypeVar("Model", bound=nn.Module)
Selection = list[tuple[LoRA, tuple[str, ...]]]


def use(model: Model, adapters: str | Sequence[str] | None) -> Model:
    """Make exactly these adapters active, their updates summed; None switches all off. Returns the same model.

    Raises LoraLabError for a name the model does not have.
    """
    names = (adapters,) if isinstance(adapters, str) else tuple(adapters or ())
    known = adapter_names(model)
    for name in names:
        if name not in known:
            raise LoraLabError(f"use({adapters!r}): this model has the adapters {known}{did_you_mean(str(name), known)}")
        if names.count(name) > 1:
            raise LoraLabError(f"use({adapters!r}): {name!r} is named twice; its update can be added once")
    for layer in lora_layers(model).values():
        layer.lora_active = tuple(name for name in names if name in layer.lora_A)
    return model


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Inside the block the model computes what it did before `inject`. Call backward() inside, too, under checkpointing."""
    before = selection(model)
    try:
        use(model, None)
        yield
    finally:
        restore_selection(before)


def activate(model: nn.Module, adapters: tuple[str, ...], trainable: bool) -> None:
    """`use`, and only these adapters' parameters are trainable (or none, for inference)."""
    use(model, adapters)
    for layer in lora_layers(model).values():
        for parameters in (layer.lora_A, layer.lora_B):
            for name in parameters:
                parameters[name].requires_grad_(trainable and name in adapters)


def selection(model: nn.Module) -> Selection:
    return [(layer, layer.lora_active) for layer in lora_layers(model).values()]


def restore_selection(selected: Selection) -> None:
    for layer, active in selected:
        layer.lora_active = active


@contextlib.contextmanager
def under_selection(selected: Selection) -> Iterator[None]:
    """Run a block under the selection of another moment, then come back."""
    before = [(layer, layer.lora_active) for layer, _ in selected]
    restore_selection(selected)
    try:
        yield
    finally:
        restore_selection(before)


def checkpoint_contexts(module: nn.Module) -> tuple[Any, Any]:
    """For torch.utils.checkpoint(context_fn=...): the recompute sees the selection the forward had."""
    return contextlib.nullcontext(), under_selection(selection(module))

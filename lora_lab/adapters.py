"""Which adapters take part, for the whole batch or row by row.

    use(model, ["a", "b"])                       both updates are summed; use(model, None) switches all off
    with disabled(model): ...                    the model as it was before inject
    with per_sample(model, ["a", None, "b"]): ...    one adapter for each row of the batch, in training and in inference
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from torch import nn

from .base_parameters import base_parameters_of, owners_in_place, refuse_base_parameters, restore_owners, swap_base_parameters
from .errors import LoraLabError, did_you_mean
from .layers import LoRA
from .merging import refuse_merged
from .parameters.layer import refuse_rows
from .selection import RowSelection
from .targets import adapter_names, lora_layers
from .token_rows.rows import refuse_overlap
from .wrapping import on_base

Model = TypeVar("Model", bound=nn.Module)
Selection = list[tuple[LoRA, tuple[str, ...]]]


@on_base
def use(model: Model, adapters: str | Sequence[str] | None) -> Model:
    """Make exactly these adapters active, their updates summed; None switches all off. Returns the same model.

    Raises LoraLabError for a name the model does not have, and for two adapters with a row for the same word.
    """
    refuse_merged(model, "use")
    if adapters is not None and not isinstance(adapters, (str, Sequence)):
        raise LoraLabError(f"use({adapters!r}): expected the name of an adapter, a list of names, or None")
    names = (adapters,) if isinstance(adapters, str) else tuple(adapters or ())
    check_names(model, names, f"use({adapters!r})")
    for name in names:
        if names.count(name) > 1:
            raise LoraLabError(f"use({adapters!r}): {name!r} is named twice; its update can be added once")
    if len(names) > 1:
        refuse_overlap(model, names)
    swap_base_parameters(model, names)
    for layer in lora_layers(model).values():
        layer.lora_active = tuple(name for name in names if name in layer.lora_variant)
    return model


def check_names(model: nn.Module, names: Sequence[str], where: str) -> None:
    known = adapter_names(model)
    for name in names:
        if name not in known:
            raise LoraLabError(f"{where}: this model has the adapters {known}{did_you_mean(name, known)}")


@on_base
@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Inside the block the model computes what it did before `inject`. Call backward() inside, too, under checkpointing."""
    before, owners = selection(model), owners_in_place(model)
    try:
        use(model, None)
        yield
    finally:
        restore_selection(before)
        restore_owners(owners)


@on_base
@contextlib.contextmanager
def per_sample(model: nn.Module, adapters: Sequence[str | None]) -> Iterator[None]:
    """Inside the block each row of the batch has the adapter of its name, or none: equal to running the rows one by one.

    adapters: a name or None for each row. Rows are dimension 0 of a layer's input, dimension 1 inside a module with batch_first=False. An input
    with k times as many rows takes each name for k rows in succession (beams, or batch and sequence in one dimension); any other raises.
    Call backward() inside, too, under checkpointing of a foreign model.
    Raises LoraLabError for a name the model does not have.
    """
    refuse_merged(model, "per_sample")
    if isinstance(adapters, str) or not isinstance(adapters, Sequence) or not adapters:
        raise LoraLabError(f"per_sample({adapters!r}): expected a list with a name (or None) for each row of the batch")
    check_names(model, [name for name in adapters if name is not None], f"per_sample({list(adapters)!r})")
    refuse_rows(lora_layers(model), adapters)
    refuse_base_parameters(model, [name for name in adapters if name is not None], "which all rows of per_sample share")
    before, owners = selection(model), owners_in_place(model)
    try:
        swap_base_parameters(model, ())
        for path, layer in lora_layers(model).items():
            rows = [name if name is not None and name in layer.lora_variant else None for name in adapters]
            layer.lora_active = RowSelection(rows, row_dimension(model, path))
        yield
    finally:
        restore_selection(before)
        restore_owners(owners)


def row_dimension(model: nn.Module, path: str) -> int:
    """1 inside a module that keeps the sequence first (nn.TransformerEncoderLayer(batch_first=False)), else 0."""
    owners = path.split(".")
    for end in range(len(owners), 0, -1):
        owner = model.get_submodule(".".join(owners[:end]))
        batch_first = getattr(owner, "batch_first", getattr(getattr(owner, "self_attn", None), "batch_first", None))
        if isinstance(batch_first, bool):
            return 0 if batch_first else 1
    return 0


def activate(model: nn.Module, adapters: tuple[str, ...], trainable: bool) -> None:
    """`use`, and only these adapters' parameters are trainable (or none, for inference)."""
    use(model, adapters)
    for layer in lora_layers(model).values():
        for name in layer.lora_variant:
            for container, parameter in layer.lora_parameters(name).items():
                parameter.requires_grad_(trainable and name in adapters and layer.lora_variant[name].trains(container))
    records = base_parameters_of(model)
    for owner, base_parameters in records:
        base_parameters.mark(owner, base_parameters.in_place, trainable=False)
    for owner, base_parameters in records if trainable else ():
        base_parameters.mark(owner, (name for adapter in adapters for name in base_parameters.names.get(adapter, ())), trainable=True)


# The selection of a moment ---------------------------------------------------------------------------------------------------


def selection(model: nn.Module) -> Selection:
    return [(layer, layer.lora_active) for layer in lora_layers(model).values()]


def restore_selection(selected: Selection) -> None:
    for layer, active in selected:
        if isinstance(layer, LoRA):  # not where it was ejected meanwhile
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


def weights_of(model: nn.Module, adapters: Mapping[str, float], where: str) -> dict[str, float]:
    """The weights of a combination, checked."""
    if not isinstance(adapters, Mapping) or not adapters:
        raise LoraLabError(f"{where}: expected a dict of adapter -> weight, like {{'a': 0.7, 'b': 0.3}}")
    check_names(model, list(adapters), where)
    for name, weight in adapters.items():
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
            raise LoraLabError(f"{where}: the weight of {name!r} is {weight!r}, expected a finite number")
    return {name: float(weight) for name, weight in adapters.items()}

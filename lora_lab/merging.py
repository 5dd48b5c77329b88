"""Put an adapter's update into the weights, and take it out again, bit for bit.

    merge(model)                  the weights become W + delta; inference costs nothing extra (Hu et al. 2021, arXiv:2106.09685, section 4.1)
    unmerge(model)                the exact bits from before come back, and the adapters with them

The sum is taken in float32 (float64 for float64 weights) a block of rows at a time, without forming the whole update, and rounded once to
the weight's own dtype. Subtracting the update again would not give 16-bit weights back, so merge keeps them, on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .base_parameters import Owners, owners_in_place, restore_owners, swap_base_parameters
from .errors import LoraLabError, did_you_mean
from .layers import LoRA, detach_adapters, reattach_adapters
from .selection import RowSelection
from .targets import adapter_names, lora_layers
from .token_rows.rows import followers
from .wrapping import on_base, refuse_replaced, refuse_sharded

Model = TypeVar("Model", bound=nn.Module)
ELEMENTS_AT_ONCE = 2**22  # of a weight, in float32
RECORD = "lora_merge"  # the attribute of a merged model


@dataclass
class _Merged:
    """One layer's part of a merge. parameters: those that change, as they were; bits: what `unmerge` writes back into them; own: what the layer
    has instead of a parameter that it shares; adapters: what was taken off it, once it was."""

    layer: Any
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    bits: dict[str, Tensor] = field(default_factory=dict)
    own: dict[str, nn.Parameter] = field(default_factory=dict)
    adapters: dict[str, Any] | None = None


@dataclass
class MergeReport:
    """adapters: whose updates are in the weights. layers: how many layers they went into. rounding: the largest difference between W + delta
    and what the weight's dtype holds of it; relative_rounding: the same over the layer's largest weight. restorable: whether `unmerge` can."""

    adapters: tuple[str, ...]
    layers: int
    rounding: float
    relative_rounding: float
    restorable: bool
    _state: list[_Merged] = field(default_factory=list, repr=False)
    _owners: Owners = field(default_factory=list, repr=False)

    def __str__(self) -> str:
        lost = f"rounded by at most {self.rounding:.3g} ({self.relative_rounding:.2g} of a layer's largest weight)"
        return f"{' + '.join(self.adapters)} merged into {self.layers} layers, {lost}; {'restorable' if self.restorable else 'for good'}"


@on_base
def merge(model: Model, adapter: str | None = None, *, restorable: bool = True, untie: bool = False) -> Model:
    """Add the update of an adapter to the weights; returns the same model, whose layers are the plain ones they were before `inject`.

    adapter: its name; None merges the active adapters, their updates summed. restorable: keep the old weights on the CPU for `unmerge`;
    False keeps neither them nor the adapters. untie: a weight that another module shares is given to the layer as its own first; otherwise
    such a merge is refused, as it would change the other module, too; not so trained token rows, which both are to have. While merged,
    state_dict() has merged weights and no adapters, and training is refused. `merge_report(model)` says how exact it was.
    Raises LoraLabError, the model untouched, for a model that is merged already, an unknown adapter, one of several active ones, a
    quantised layer, a grouped convolution, a tied weight, and where the sum is not finite.
    """
    refuse_merged(model, "merge")
    refuse_replaced(model, "merge")
    refuse_sharded(model, "merge")
    names = _to_merge(model, adapter)
    layers = {path: layer for path, layer in lora_layers(model).items() if any(name in layer.lora_variant for name in names)}
    tied = {id(layer): layer.weight for layer in followers(model, names)}
    layers = {path: layer for path, layer in layers.items() if id(layer) not in tied}
    shared = _shared_parameters(model) - {id(weight) for weight in tied.values()}
    for path, layer in layers.items():
        _check(path, layer, names, shared, untie)
    errors = [_survey(path, layer, names) for path, layer in layers.items()]
    report = MergeReport(names, len(layers), max(error for error, _ in errors), max(share for _, share in errors), restorable)
    report._owners = owners_in_place(model)
    try:
        swap_base_parameters(model, names)
        report._state = [_prepare(layer, names if path in layers else (), shared, restorable) for path, layer in lora_layers(model).items()]
        for merged in report._state:
            _merge_layer(merged, names)
        for merged in report._state:  # when all are merged, as one may read another's adapters (token rows)
            merged.adapters = detach_adapters(merged.layer)
    except BaseException:
        _undo(report)
        raise
    if not restorable:
        report._state.clear()
    setattr(model, RECORD, report)
    return model


@on_base
def unmerge(model: Model) -> Model:
    """Undo `merge`: the weights have the bits they had, the adapters are back and active as before. Returns the same model.

    Raises LoraLabError where nothing is merged, or was merged with restorable=False.
    """
    report = merge_report(model)
    if report is None:
        raise LoraLabError(f"this {type(model).__name__} is not merged")
    if not report.restorable:
        raise LoraLabError("merged with restorable=False: the old weights were not kept; load the model again")
    _undo(report)
    delattr(model, RECORD)
    return model


@on_base
def merge_report(model: nn.Module) -> MergeReport | None:
    """What is merged into this model; None where nothing is."""
    report = vars(model).get(RECORD)
    assert report is None or isinstance(report, MergeReport)
    return report


def merged_modules(model: nn.Module) -> list[nn.Module]:
    """The model and the modules in it that `merge` was called with."""
    return [module for module in model.modules() if merge_report(module) is not None]


def refuse_merged(model: nn.Module, verb: str) -> None:
    """For the verbs that need the adapters in their places."""
    for report in filter(None, map(merge_report, merged_modules(model))):
        way_out = "call unmerge first" if report.restorable else "call eject to go on with the merged weights as plain ones"
        raise LoraLabError(f"{verb}: {' + '.join(report.adapters)} is merged into this model's weights; {way_out}")


# Before anything is changed ---------------------------------------------------------------------------------------------------


def _to_merge(model: nn.Module, adapter: str | None) -> tuple[str, ...]:
    known = adapter_names(model)
    if not known:
        raise LoraLabError(f"this {type(model).__name__} has no adapters to merge")
    active = {name for layer in lora_layers(model).values() for name in layer.lora_active}
    if any(isinstance(layer.lora_active, RowSelection) for layer in lora_layers(model).values()):
        raise LoraLabError("merge inside per_sample(...): the rows have different adapters, the weights can have one; merge outside")
    if adapter is not None and adapter not in known:
        raise LoraLabError(f"adapter={adapter!r}: this model has {known}{did_you_mean(adapter, known)}")
    if adapter is not None and adapter in active and len(active) > 1:
        raise LoraLabError(f"adapter={adapter!r}: {sorted(active)} are active together; merge(model) merges all, use(model, {adapter!r}) leaves one")
    if adapter is None and not active:
        raise LoraLabError(f"no adapter is active: name one of {known}")
    return (adapter,) if adapter is not None else tuple(name for name in known if name in active)


def _shared_parameters(model: nn.Module) -> set[int]:
    """Parameters that more than one module holds."""
    holders: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    return {key for key, count in holders.items() if count > 1}


def _check(path: str, layer: LoRA, names: tuple[str, ...], shared: set[int], untie: bool) -> None:
    module: Any = layer
    if hasattr(module, "quantization"):
        raise LoraLabError(f"{path!r} is quantised to {module.quantization}: rounding would take the adapter away again; dequantize(model) first")
    if layer.lora_kind.weight not in _holder(layer)._parameters:
        raise LoraLabError(f"{path!r} computes its weight (a parametrisation or weight_norm), so there is none to merge into: remove that first")
    if getattr(module, "groups", 1) > 1:
        raise LoraLabError(f"{path!r} is a grouped convolution: its update sees all channels and is no grouped kernel; it cannot be merged")
    if any(name in layer.lora_extra("lora_B_bias") for name in names) and module.bias is None:
        raise LoraLabError(f"{path!r} has no bias to merge the adapter's into")
    for name, parameter in _changed(layer, names).items():
        if not parameter.is_floating_point() or parameter.is_meta:
            raise LoraLabError(f"{path!r} has a {name} of {parameter.dtype} on {parameter.device}, to which no update can be added")
        if id(parameter) in shared and not untie:
            raise LoraLabError(f"{path!r} shares its {name} with another module (tied embeddings), which would change, too: merge(model, untie=True)"
                               " gives it one of its own first; then say so in the config (tie_word_embeddings=False) before saving")  # fmt: skip


def _changed(layer: Any, names: tuple[str, ...]) -> dict[str, nn.Parameter]:
    """The parameters that a merge of these adapters changes in a layer."""
    biased = any(name in layer.lora_extra("lora_B_bias") for name in names)
    parameters = (layer.lora_kind.weight, *(["bias"] if biased else []))
    return {name: getattr(_holder(layer), name) for name in parameters} if any(name in layer.lora_variant for name in names) else {}


def _holder(layer: Any) -> Any:
    """The module whose weight an adapter changes: the layer, or the owner of a parameter."""
    return getattr(layer, "lora_owner", layer)


def _survey(path: str, layer: LoRA, names: tuple[str, ...]) -> tuple[float, float]:
    """The largest rounding error of the merge to come, and its share of the largest weight."""
    weight, largest, error = layer.lora_kind.matrix(layer), 0.0, 0.0
    for rows, exact in _sums(layer, names):
        rounded = exact.to(weight.dtype)
        if not torch.isfinite(rounded).all():
            raise LoraLabError(f"{path!r}: W + delta is not finite in {weight.dtype}: the adapter holds NaN or is far too large; nothing was merged")
        error = max(error, float((rounded.to(exact.dtype) - exact).abs().max()))
        largest = max(largest, float(weight[rows].abs().max()))
    return error, error / max(largest, torch.finfo(torch.float32).tiny)


@torch.no_grad()
def _sums(layer: LoRA, names: tuple[str, ...]) -> Iterator[tuple[slice, Tensor]]:
    """W + delta, block by block of rows, in float32 or wider."""
    weight = layer.lora_kind.matrix(layer)
    dtype, step = torch.promote_types(weight.dtype, torch.float32), max(1, ELEMENTS_AT_ONCE // weight.shape[1])
    for start in range(0, weight.shape[0], step):
        rows = slice(start, min(start + step, weight.shape[0]))
        total = frozen = weight[rows].to(dtype)
        for name in names:
            if name in layer.lora_variant:
                total = layer.lora_variant[name].merged(layer, name, rows, frozen, total)
        yield rows, total


# The change itself ----------------------------------------------------------------------------------------------------------------


def _prepare(layer: LoRA, names: tuple[str, ...], shared: set[int], restorable: bool) -> _Merged:
    """All the memory that merging a layer needs, and nothing changed yet."""
    merged = _Merged(layer, _changed(layer, names))
    for name, parameter in merged.parameters.items():
        if id(parameter) in shared:
            merged.own[name] = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
        elif restorable:
            merged.bits[name] = parameter.detach().to("cpu", copy=True)
    return merged


@torch.no_grad()
def _merge_layer(merged: _Merged, names: tuple[str, ...]) -> None:
    layer = merged.layer
    for name, parameter in merged.own.items():
        setattr(_holder(layer), name, parameter)
    if merged.parameters:
        _add_to_weight(layer, names)
    for adapter in names if "bias" in merged.parameters else ():
        if adapter in layer.lora_extra("lora_B_bias"):
            layer.bias += (layer.lora_scaling[adapter] * layer.lora_B_bias[adapter]).to(layer.bias.dtype)


def _add_to_weight(layer: Any, names: tuple[str, ...]) -> None:
    matrix, weight = layer.lora_kind.matrix(layer), getattr(_holder(layer), layer.lora_kind.weight)
    for rows, total in _sums(layer, names):
        matrix[rows] = total.to(matrix.dtype)
    if matrix.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr():
        weight.copy_(layer.lora_kind.stored(matrix, layer))  # the weight lies otherwise in memory (channels_last), and this was a copy


@torch.no_grad()
def _undo(report: MergeReport) -> None:
    for merged in report._state:
        for name, parameter in merged.parameters.items():
            if name in merged.own:
                setattr(_holder(merged.layer), name, parameter)
            elif name in merged.bits:
                getattr(_holder(merged.layer), name).copy_(merged.bits[name])
        if merged.adapters is not None:
            reattach_adapters(merged.layer, merged.adapters)
    restore_owners(report._owners)

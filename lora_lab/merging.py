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

from .borrowed import active_borrowers, swap_borrowed
from .errors import LoraLabError, did_you_mean
from .layers import LoRA, detach_adapters, reattach_adapters
from .selection import RowSelection
from .targets import adapter_names, lora_layers

Model = TypeVar("Model", bound=nn.Module)
ELEMENTS_AT_ONCE = 2**22  # of a weight, in float32
RECORD = "lora_merge"  # the attribute of a merged model


@dataclass
class _Merged:
    """What `unmerge` puts back into one layer: its adapters, and the parameters it had with their bits."""

    layer: nn.Module
    adapters: dict[str, Any]
    parameters: dict[str, nn.Parameter]
    bits: dict[str, Tensor]


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
    _active: tuple[str, ...] = ()

    def __str__(self) -> str:
        lost = f"rounded by at most {self.rounding:.3g} ({self.relative_rounding:.2g} of a layer's largest weight)"
        return f"{' + '.join(self.adapters)} merged into {self.layers} layers, {lost}; {'restorable' if self.restorable else 'for good'}"


def merge(model: Model, adapter: str | None = None, *, restorable: bool = True, untie: bool = False) -> Model:
    """Add the update of an adapter to the weights; returns the same model, whose layers are the plain ones they were before `inject`.

    adapter: its name; None merges the active adapters, their updates summed. restorable: keep the old weights on the CPU for `unmerge`;
    False keeps neither them nor the adapters. untie: a weight that another module shares is given to the layer as its own first; otherwise
    such a merge is refused, as it would change the other module, too. While merged, state_dict() has merged weights and no adapters, and
    training is refused. `merge_report(model)` says how exact it was.
    Raises LoraLabError, the model untouched, for a model that is merged already, an unknown adapter, one of several active ones, a
    quantised layer, a grouped convolution, a tied weight, and where the sum is not finite.
    """
    if merge_report(model) is not None:
        raise LoraLabError("this model is merged already: call unmerge first")
    names = _to_merge(model, adapter)
    layers = {path: layer for path, layer in lora_layers(model).items() if any(name in layer.lora_A for name in names)}
    shared = _shared_parameters(model)
    for path, layer in layers.items():
        _check(path, layer, names, shared, untie)
    errors = [_survey(path, layer, names) for path, layer in layers.items()]
    report = MergeReport(names, len(layers), max(error for error, _ in errors), max(share for _, share in errors), restorable)
    report._active = active_borrowers(model)
    swap_borrowed(model, names)
    for path, layer in lora_layers(model).items():
        report._state.append(_merge_layer(layer, names if path in layers else (), shared, restorable))
    if not restorable:
        report._state.clear()
    setattr(model, RECORD, report)
    return model


def unmerge(model: Model) -> Model:
    """Undo `merge`: the weights have the bits they had, the adapters are back and active as before. Returns the same model.

    Raises LoraLabError where nothing is merged, or was merged with restorable=False.
    """
    report = merge_report(model)
    if report is None:
        raise LoraLabError(f"this {type(model).__name__} is not merged")
    if not report.restorable:
        raise LoraLabError("merged with restorable=False: the old weights were not kept; load the model again")
    for merged in report._state:
        _put_back(merged)
    swap_borrowed(model, report._active)
    delattr(model, RECORD)
    return model


def merge_report(model: nn.Module) -> MergeReport | None:
    """What is merged into this model; None where nothing is."""
    report = vars(model).get(RECORD)
    assert report is None or isinstance(report, MergeReport)
    return report


def refuse_merged(model: nn.Module, verb: str) -> None:
    """For the verbs that need the adapters in their places."""
    if (report := merge_report(model)) is not None:
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
    if layer.lora_kind.weight not in module._parameters:
        raise LoraLabError(f"{path!r} computes its weight (a parametrisation or weight_norm), so there is none to merge into: remove that first")
    if getattr(module, "groups", 1) > 1:
        raise LoraLabError(f"{path!r} is a grouped convolution: its update sees all channels and is no grouped kernel; it cannot be merged")
    if any(name in layer.lora_extra("lora_B_bias") for name in names) and module.bias is None:
        raise LoraLabError(f"{path!r} has no bias to merge the adapter's into")
    if id(getattr(module, layer.lora_kind.weight)) in shared and not untie:
        raise LoraLabError(f"{path!r} shares its weight with another module (tied embeddings), which would change, too: merge(model, untie=True) "
                           "gives it a weight of its own first; then say so in the config (tie_word_embeddings=False) before saving")  # fmt: skip


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
        total = weight[rows].to(dtype)
        for name in names:
            if name in layer.lora_A:
                total = total + layer.lora_variant[name].delta(layer, name, rows).to(dtype)
        yield rows, total


# The change itself ----------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _merge_layer(layer: Any, names: tuple[str, ...], shared: set[int], restorable: bool) -> _Merged:
    biased = [adapter for adapter in names if adapter in layer.lora_extra("lora_B_bias")]
    name = layer.lora_kind.weight
    parameters = {name: getattr(layer, name), **({"bias": layer.bias} if biased else {})} if names else {}
    bits = {key: parameter.detach().to("cpu", copy=True) for key, parameter in parameters.items() if restorable and id(parameter) not in shared}
    if names and id(weight := getattr(layer, name)) in shared:
        setattr(layer, name, nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad))
    matrix = layer.lora_kind.matrix(layer)
    for rows, total in _sums(layer, names) if names else ():
        matrix[rows] = total.to(matrix.dtype)
    if names and matrix.untyped_storage().data_ptr() != (weight := getattr(layer, name)).untyped_storage().data_ptr():
        weight.copy_(layer.lora_kind.stored(matrix, layer))  # the weight lies otherwise in memory (channels_last), and this was a copy
    for adapter in biased:
        layer.bias += (layer.lora_scaling[adapter] * layer.lora_B_bias[adapter]).to(layer.bias.dtype)
    return _Merged(layer, detach_adapters(layer), parameters, bits)


@torch.no_grad()
def _put_back(merged: _Merged) -> None:
    for name, parameter in merged.parameters.items():
        if name in merged.bits:
            getattr(merged.layer, name).copy_(merged.bits[name])
        else:  # it was shared, and the layer had a copy while merged
            setattr(merged.layer, name, parameter)
    reattach_adapters(merged.layer, merged.adapters)

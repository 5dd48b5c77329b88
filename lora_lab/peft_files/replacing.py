"""`load(..., replace=True)`: whether the adapter in the model and the one in the file differ in their values only."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import LoraLabError, did_you_mean
from ..fused.parts import parts_in
from ..injection import injection_of
from ..layers import LoRA
from ..parameters.layer import parameter_path
from ..plans import Plan, PlannedLayer
from ..targets import adapter_names, lora_layers
from ..token_rows.rows import own_rows, words_of


def check_replaceable(model: nn.Module, adapter: str, plan: Plan) -> None:
    """Raise LoraLabError for the first difference, with both values."""
    if adapter not in (names := adapter_names(model)):
        raise LoraLabError(f"replace=True: this model has {names or 'no adapters'}, and none called {adapter!r}{did_you_mean(adapter, names)}")
    here = {parameter_path(path): layer for path, layer in lora_layers(model).items() if adapter in layer.lora_A}
    there = {planned.path: planned for planned in plan.layers}
    if only := sorted(here.keys() ^ there.keys()):
        raise _differs(adapter, f"the layer {only[0]!r}", *("adapted" if only[0] in layers else "left alone" for layers in (here, there)))
    for path, planned in there.items():
        in_model, in_file = _layer_here(here[path], adapter), _layer_there(planned, plan)
        for what, value in in_file.items():
            if in_model[what] != value:
                raise _differs(adapter, f"{what} of {path!r}", in_model[what], value)
    words = {path: words_of(layer, adapter) for path, layer in own_rows(model, adapter).items()}
    if words != (in_plan := {part.path: list(part.indices) for part in plan.tokens}):
        raise _differs(adapter, "the words with rows of their own", words, in_plan)
    injection = injection_of(model)
    along = sorted(injection.base_parameters.names.get(adapter, ())) if injection is not None else []
    if along != sorted(plan.along):
        raise _differs(adapter, "what it trains of the model itself", along, sorted(plan.along))


def _differs(adapter: str, what: str, here: Any, there: Any) -> LoraLabError:
    return LoraLabError(f"replace=True takes an adapter that differs in its values only; {what}: {here!r} in {adapter!r} here, {there!r} in the "
                        "file. Load it under another name, or eject first")  # fmt: skip


def _layer_here(layer: LoRA, adapter: str) -> dict[str, Any]:
    return {"the rank": layer.lora_variant[adapter].rank(layer, adapter), "the scaling": layer.lora_scaling[adapter],
            "the tensors": sorted(layer.lora_parameters(adapter)), "the parts": parts_in(layer, adapter)}  # fmt: skip


def _layer_there(planned: PlannedLayer, plan: Plan) -> dict[str, Any]:
    vectors = {"lora_magnitude_vector": plan.config.variant == "dora", "lora_B_bias": plan.config.lora_bias}
    tensors = sorted(["lora_A", "lora_B", *(name for name, there in vectors.items() if there)])
    return {"the rank": planned.rank, "the scaling": planned.scaling, "the tensors": tensors, "the parts": planned.parts}

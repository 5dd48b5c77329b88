"""Biases and whole modules in PEFT's files: under their own names, the bias of an adapted layer below `base_layer`."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from .borrowed import Borrowed, borrowed_names, modules_of
from .errors import LoraLabError
from .targets import AdapterConfig

PREFIX = "base_model.model."
OF_THE_ADAPTER = re.compile(r"\.lora_[A-Za-z_]+(\.weight|\.bias)?$")


def borrowed_for_file(model: nn.Module, borrowed: Borrowed, adapter: str, config: AdapterConfig, adapted: Collection[str]) -> dict[str, Tensor]:
    """What an adapter trained of the model itself, as PEFT names it; a tied tensor under each of its names."""
    names = {id(model.get_parameter(name)): name for name in borrowed.names.get(adapter, ())}
    found: dict[str, Tensor] = {}
    for name in (*borrowed.names.get(adapter, ()), *_in_modules(model, config)):
        first = names[id(model.get_parameter(name))]
        here = borrowed.in_place[first] == adapter
        values = model.get_parameter(first).detach() if here else borrowed.aside[adapter, first]
        found[PREFIX + _in_file(name, adapted)] = values.clone()
    return found


def _in_modules(model: nn.Module, config: AdapterConfig) -> list[str]:
    return [f"{path}.{name}" for path in modules_of(model, config.modules_to_save) for name, _ in model.get_submodule(path).named_parameters()]


def _in_file(name: str, adapted: Collection[str]) -> str:
    layer, _, last = name.rpartition(".")
    return f"{layer}.base_layer.bias" if last == "bias" and layer in adapted else name


def of_this_model(model: nn.Module, config: AdapterConfig) -> AdapterConfig:
    """PEFT names "classifier" and "score" for every classifier; those that this model does not have are left out."""
    paths = [path for path, module in model.named_modules(remove_duplicate=False) if path and next(module.parameters(), None) is not None]
    names = [name for name in config.modules_to_save or () if any(path == name or path.endswith(f".{name}") for path in paths)]
    return replace(config, modules_to_save=names or None)


def own_tensors(model: nn.Module, tensors: Mapping[str, Tensor], config: AdapterConfig, folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The file in two: the adapter's tensors as they are, and those of the model itself by parameter name, checked.

    Raises LoraLabError for one that the configuration does not announce, one that is announced and missing, another shape, NaN.
    """
    mine = {key: tensor for key, tensor in tensors.items() if OF_THE_ADAPTER.search(key)}
    others = {key.removeprefix(PREFIX).replace(".base_layer.", "."): tensor for key, tensor in tensors.items() if key not in mine}
    adapted = {OF_THE_ADAPTER.sub("", key.removeprefix(PREFIX)).replace(".base_layer.", ".") for key in mine}
    wanted = borrowed_names(model, sorted(adapted), config.bias, config.modules_to_save) if config.bias != "none" or config.modules_to_save else ()
    names = {id(model.get_parameter(name)): name for name in wanted}
    found: dict[str, Tensor] = {}
    for name, tensor in others.items():
        parameter = _parameter(model, name)
        if parameter is None or id(parameter) not in names:
            raise LoraLabError(f"unexpected tensor {name!r}: bias={config.bias!r} and modules_to_save={config.modules_to_save!r} in {folder} do not "
                               f"announce it; expected '{PREFIX}<path>.lora_A.weight' or '...lora_B.weight'")  # fmt: skip
        if tensor.shape != parameter.shape or not tensor.is_floating_point() or not torch.isfinite(tensor).all():
            raise LoraLabError(f"{folder}: tensor {name!r} ({tensor.dtype}, {list(tensor.shape)}): expected {list(parameter.shape)} finite numbers")
        found[names[id(parameter)]] = tensor
    if missing := [name for name in wanted if name not in found]:
        raise LoraLabError(f"{folder}: bias={config.bias!r} and modules_to_save={config.modules_to_save!r}, but {missing[0]!r} is not in the file")
    return mine, found


def _parameter(model: nn.Module, name: str) -> nn.Parameter | None:
    try:
        return model.get_parameter(name)
    except AttributeError:
        return None

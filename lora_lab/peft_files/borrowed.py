"""Biases, whole modules and embeddings in PEFT's files: under their own names, those of an adapted layer below `base_layer`.

PEFT writes the embeddings whole where they are adapted or the vocabulary was resized (save_embedding_layers). Those that are the base's own are
left out on reading; others become the adapter's, which are in place while it is active and do not train, as in PEFT.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..borrowed import BIASES, Borrowed, base_in_place, biases_of, borrowed_names, of_an_adapter, saved_names, tensor_of
from ..errors import LoraLabError
from ..plans import AdapterConfig
from .config import PREFIX

OF_THE_ADAPTER = re.compile(r"\.lora_[A-Za-z_]+(\.weight|\.bias)?$")


def borrowed_for_file(model: nn.Module, borrowed: Borrowed, adapter: str, config: AdapterConfig, adapted: Collection[str]) -> dict[str, Tensor]:
    """What an adapter trained of the model itself, as PEFT names it; a tied tensor under each of its names."""
    names = {id(tensor_of(model, name)): name for name in borrowed.names.get(adapter, ())}
    found: dict[str, Tensor] = {}
    for name in (*borrowed.names.get(adapter, ()), *saved_names(model, config.modules_to_save)):
        first = names[id(tensor_of(model, name))]
        here = borrowed.in_place[first] == adapter
        values = tensor_of(model, first).detach() if here else borrowed.aside[adapter, first]
        found[PREFIX + _in_file(name, adapted)] = values.clone()
    return found


def _in_file(name: str, adapted: Collection[str]) -> str:
    """PEFT's wrapper of an adapted layer holds it as base_layer, that of an adapted attention its out_proj's wrapper, too."""
    layer, _, last = name.rpartition(".")
    owner, _, leaf = layer.rpartition(".")
    if leaf == "out_proj" and owner in adapted:
        return f"{owner}.base_layer.out_proj.base_layer.{last}"
    return f"{layer}.base_layer.{last}" if layer in adapted else name


def of_this_model(model: nn.Module, config: AdapterConfig) -> AdapterConfig:
    """PEFT names "classifier" and "score" for every classifier; those that this model does not have are left out."""
    paths = [path for path, module in model.named_modules(remove_duplicate=False) if path and next(module.parameters(), None) is not None]
    names = [name for name in config.modules_to_save or () if any(path == name or path.endswith(f".{name}") for path in paths)]
    return replace(config, modules_to_save=names or None)


def own_tensors(
    model: nn.Module, tensors: Mapping[str, Tensor], config: AdapterConfig, folder: Path
) -> tuple[dict[str, Tensor], dict[str, Tensor], frozenset[str]]:
    """The file in two: the adapter's tensors as they are, and those of the model itself by parameter name, checked; and which of these are still.

    Raises LoraLabError for one that the configuration does not announce, one that is announced and missing, another shape, NaN.
    """
    mine = {key: tensor for key, tensor in tensors.items() if OF_THE_ADAPTER.search(key)}
    others = {key.removeprefix(PREFIX).replace(".base_layer.", "."): tensor for key, tensor in tensors.items() if key not in mine}
    adapted = {OF_THE_ADAPTER.sub("", key.removeprefix(PREFIX)).replace(".base_layer.", ".") for key in mine}
    none_there = config.bias in BIASES and not biases_of(model, adapted, config.bias)  # T5 has none, and PEFT takes bias="all" for it
    bias = "none" if none_there else config.bias
    announced = borrowed_names(model, sorted(adapted), bias, config.modules_to_save)
    names, embeddings = ({id(tensor_of(model, name)): name for name in group} for group in (announced, _embeddings(model)))
    found: dict[str, Tensor] = {}
    for name, tensor in others.items():
        parameter = _parameter(model, name)
        if parameter is None or id(parameter) not in names | embeddings:
            raise LoraLabError(f"unexpected tensor {name!r}: bias={config.bias!r} and modules_to_save={config.modules_to_save!r} in {folder} do not "
                               f"announce it; expected '{PREFIX}<path>.lora_A.weight' or '...lora_B.weight'")  # fmt: skip
        _check(name, tensor, parameter, folder, id(parameter) in embeddings)
        first = (embeddings | names)[id(parameter)]
        if first in found and not torch.equal(found[first], tensor):
            raise LoraLabError(f"{folder}: {name!r} and {first!r} are one tensor in this model, and two different ones in the file: untie them first")
        found[first] = tensor
    if missing := [name for name in announced if name not in found]:
        raise LoraLabError(f"{folder}: bias={config.bias!r} and modules_to_save={config.modules_to_save!r}, but {missing[0]!r} is not in the file")
    values = {name: tensor for name, tensor in found.items() if name in announced or not _is_the_bases(model, name, tensor)}
    return mine, values, frozenset(values) - set(announced)


def _check(name: str, tensor: Tensor, parameter: Tensor, folder: Path, embedding: bool) -> None:
    hint = f": resize this model's vocabulary first, to {len(tensor)}" if embedding and tensor.shape[1:] == parameter.shape[1:] else ""
    if tensor.shape != parameter.shape or tensor.is_floating_point() != parameter.is_floating_point() or not torch.isfinite(tensor).all():
        raise LoraLabError(f"{folder}: tensor {name!r} ({tensor.dtype}, {list(tensor.shape)}): expected {list(parameter.shape)} finite numbers{hint}")


def _embeddings(model: nn.Module) -> list[str]:
    """The parameters of the embedding and of the head, of a model that says which these are; a tied one by its first name."""
    found = []
    for name in ("get_input_embeddings", "get_output_embeddings"):
        with contextlib.suppress(AttributeError, NotImplementedError):  # transformers' models without one
            found.append(getattr(model, name)())
    wanted = {id(parameter) for module in found if isinstance(module, nn.Module) for parameter in module.parameters()}
    return [name for name, parameter in model.named_parameters() if id(parameter) in wanted and not of_an_adapter(name)]


def _is_the_bases(model: nn.Module, name: str, tensor: Tensor) -> bool:
    with base_in_place(model):
        own = tensor_of(model, name)
        return torch.equal(tensor.to(own.device, own.dtype), own)


def _parameter(model: nn.Module, name: str) -> Tensor | None:
    try:
        return tensor_of(model, name)
    except (AttributeError, AssertionError):
        return None

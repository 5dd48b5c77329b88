"""Biases, whole modules and embeddings in PEFT's files: under their own names, those of an adapted layer below `base_layer`.

PEFT writes the embeddings whole where they are adapted or the vocabulary was resized (save_embedding_layers). Those that are the base's own are
left out on reading; others become the adapter's, which are in place while it is active and do not train, as in PEFT.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..base_parameters import (
    BIASES,
    PREFIX,
    BaseParameters,
    base_in_place,
    base_parameter_names,
    base_values,
    biases_of,
    named_at_dots,
    names_of_each,
    of_an_adapter,
    saved_names,
    tensor_of,
)
from ..checks import are_finite
from ..errors import LoraLabError
from ..plans import AdapterConfig
from .names import meant_by_peft
from .ties import check_ties, how_to_untie

Tensors = dict[str, Tensor]
Anything = TypeVar("Anything")
COPIES = re.compile(r"\.(original_module|modules_to_save)(?=\.)|(?<=\.lora_magnitude_vector)\.weight$")
OF_THE_ADAPTER = re.compile(r"\.lora_[A-Za-z_]+(\.weight|\.bias)?$")


def base_parameters_for_file(
    model: nn.Module, base_parameters: BaseParameters, adapter: str, modules_to_save: Sequence[str], adapted: Collection[str]
) -> Tensors:
    """What an adapter trained of the model itself, as PEFT names it; a tied tensor under each of its names. modules_to_save: as in the file.

    PEFT wants all modules whole that it means by these names: what is in one and is not the adapter's is the base's own. What is in none it puts in
    the base's place.
    """
    own, every = base_parameters.names.get(adapter, ()), names_of_each(model)
    first = {id(tensor_of(model, name)): name for name in reversed(own)}
    whole = saved_names(model, [PREFIX + path for path in meant_by_peft(model, modules_to_save)])
    named = [(name, id(tensor_of(model, name))) for name in (*own, *whole)]
    names = dict.fromkeys(other for name, tensor in named for other in (name, *every.get(tensor, ())))
    others = [name for name in names if id(tensor_of(model, name)) not in first]
    of_base = base_values(model, others) if others else {}
    trained = {name: _value(model, base_parameters, adapter, first[id(tensor_of(model, name))]) for name in names if name not in of_base}
    return {PREFIX + _in_file(name, adapted): tensor.clone() for name, tensor in {**trained, **of_base}.items()}


def _value(model: nn.Module, base_parameters: BaseParameters, adapter: str, name: str) -> Tensor:
    here = base_parameters.in_place[name] == adapter
    return tensor_of(model, name).detach() if here else base_parameters.aside[adapter, name]


def _in_file(name: str, adapted: Collection[str]) -> str:
    """PEFT's wrapper of an adapted layer holds it as base_layer, that of an adapted attention its out_proj's wrapper, too."""
    layer, _, last = name.rpartition(".")
    owner, _, leaf = layer.rpartition(".")
    if leaf == "out_proj" and owner in adapted:
        return f"{owner}.base_layer.out_proj.base_layer.{last}"
    return f"{layer}.base_layer.{last}" if layer in adapted else name


def without_copies(tensors: Mapping[str, Anything]) -> dict[str, Anything]:
    """Without what PEFT's wrappers hold twice: bias="all" and save_embedding_layers write it under the wrapper's names, too.

    >>> [*without_copies({"head.bias": 1, "head.original_module.bias": 2, "head.modules_to_save.bias": 1})]
    ['head.bias']
    """
    return {key: tensor for key, tensor in tensors.items() if not COPIES.search(key) or COPIES.sub("", key) not in tensors}


def of_this_model(model: nn.Module, config: AdapterConfig) -> AdapterConfig:
    """With modules_to_save as it is meant here. PEFT compares ends of paths without regard to dots: to it "norm" is "input_layernorm", too.

    And it names "classifier" and "score" for every classifier; those that this model does not have are left out.
    """
    names: list[str] = []
    for name in config.modules_to_save or ():
        meant = meant_by_peft(model, [name])
        names += [name] if meant and all(named_at_dots(path, name) for path in meant) else [PREFIX + path for path in meant]
    return replace(config, modules_to_save=list(dict.fromkeys(names)) or None)


@dataclass(frozen=True)
class OwnTensors:
    """Of a file: values for tensors of the model itself, by name, a tied one by its first.

    still: which of these do not train.  unchanged: those that the file has and that are the base's own.
    """

    values: Tensors
    still: frozenset[str]
    unchanged: frozenset[str] = frozenset()

    def without(self, name: str) -> OwnTensors:
        return replace(self, values={key: tensor for key, tensor in self.values.items() if key != name}, still=self.still - {name})

    def with_still(self, name: str, tensor: Tensor) -> OwnTensors:
        return replace(self, values={**self.values, name: tensor}, still=self.still | {name})


def own_tensors(model: nn.Module, tensors: Mapping[str, Tensor], config: AdapterConfig, folder: Path) -> tuple[Tensors, OwnTensors]:
    """The file in two: the adapter's tensors as they are, and those of the model itself, checked.

    Raises LoraLabError for one that the configuration does not announce, one that is announced and missing, another shape, NaN, and where one
    tensor of this model would need two values.
    """
    mine = {key: tensor for key, tensor in tensors.items() if OF_THE_ADAPTER.search(key)}
    others = {path_in(key): tensor for key, tensor in tensors.items() if key not in mine}
    announced = _announced(model, adapted_paths(mine), config)
    names, embeddings = ({id(tensor_of(model, name)): name for name in group} for group in (announced, _embeddings(model)))
    found: dict[str, tuple[str, Tensor]] = {}  # the first name here -> name in the file, values
    for name, tensor in others.items():
        parameter = _parameter(model, name)
        if parameter is None or id(parameter) not in names | embeddings:
            raise LoraLabError(f"unexpected tensor {name!r}: bias={config.bias!r} and modules_to_save={config.modules_to_save!r} in {folder} do not "
                               f"announce it; expected '{PREFIX}<path>.lora_A.weight' or '...lora_B.weight'")  # fmt: skip
        _check(name, tensor, parameter, folder, id(parameter) in embeddings)
        before, known = found.setdefault((embeddings | names)[id(parameter)], (name, tensor))
        if not torch.equal(known, tensor):
            raise LoraLabError(f"{folder}: {before!r} and {name!r} are one tensor in this model, and two different ones in the file: "
                               f"{how_to_untie(model, name, before)}")  # fmt: skip
    if missing := [name for name in announced if name not in found]:
        raise LoraLabError(f"{folder}: bias={config.bias!r} and modules_to_save={config.modules_to_save!r}, but {missing[0]!r} is not in the file")
    check_ties(model, config, others, folder)
    values = {name: tensor for name, (_, tensor) in found.items() if name in announced or not _is_the_bases(model, name, tensor)}
    return mine, OwnTensors(values, frozenset(values) - set(announced), frozenset(found) - set(values))


def adapted_paths(tensors: Iterable[str]) -> set[str]:
    """Paths of the layers that a file has tensors of an adapter for."""
    return {path_in(OF_THE_ADAPTER.sub("", key)) for key in tensors if OF_THE_ADAPTER.search(key)}


def path_in(key: str) -> str:
    """A name in a file as the model's."""
    return key.removeprefix(PREFIX).replace(".base_layer.", ".")


def _announced(model: nn.Module, adapted: Collection[str], config: AdapterConfig) -> tuple[str, ...]:
    none_there = config.bias in BIASES and not biases_of(model, adapted, config.bias)  # T5 has none, and PEFT takes bias="all" for it
    return base_parameter_names(model, sorted(adapted), "none" if none_there else config.bias, config.modules_to_save)


def _check(name: str, tensor: Tensor, parameter: Tensor, folder: Path, embedding: bool) -> None:
    hint = f": resize this model's vocabulary first, to {len(tensor)}" if embedding and tensor.shape[1:] == parameter.shape[1:] else ""
    fits = are_finite(tensor) if parameter.is_floating_point() else not tensor.is_floating_point()
    if tensor.shape != parameter.shape or not fits:
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

"""Tied weights in PEFT's files. Here a tied tensor is one tensor, whichever of its modules is named; PEFT has a copy for each module it names.

    modules_to_save names            PEFT trains                                        here
    all modules of a tied tensor     a copy for each, which begin alike                 the one tensor: the same while the copies are equal
    some of them                     copies of these; the others keep the base's        cannot be said: refused, or untie the model first
    the same, ensure_weight_tying    one copy for all (embed_tokens and lm_head only)   the one tensor

So a file that is written has the values under all names, names all modules where that can be, and ensures their tying where PEFT can: it gives
each a bare nn.Linear without a bias, which no second embedding is (T5 has three).
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from ..base_parameters import PREFIX, modules_of, names_of_each, saved_names, tensor_of
from ..errors import LoraLabError
from ..layers import LoRA
from ..paths import is_inside
from ..plans import AdapterConfig
from ..wrapping import whole
from .names import exact_names, meant_by_peft


def owner_of(name: str) -> str:
    """'lm_head.weight' -> 'lm_head'."""
    return name.rpartition(".")[0]


# Writing ------------------------------------------------------------------------------------------------------------------------


def whole_modules(model: nn.Module, names: Sequence[str] | None, adapted: Collection[str] = ()) -> list[str]:
    """modules_to_save as a file has to say it: with the modules that have a tensor in common with these. adapted: paths with an adapter.

    Without those in which PEFT could not train all: with an adapter, or around what is named. Their tensor is in the file all the same, and PEFT
    puts it in its place (see `base_parameters_for_file`).
    """
    inside = modules_of(model, names)
    said = {name: [name] for name in names or ()}
    for name in said:
        if name.startswith(PREFIX) or not {*meant_by_peft(model, [name])} <= {*inside}:
            said[name] = exact_names(model, modules_of(model, [name]))
    owners = dict.fromkeys(owner_of(name) for group in tied_groups(model, names) for name in group)
    more = [owner for owner in owners if owner and not is_inside(owner, inside) and not any(is_inside(path, [owner]) for path in (*inside, *adapted))]
    return list(dict.fromkeys([*itertools.chain(*said.values()), *exact_names(model, more)]))


def tied_groups(model: nn.Module, names: Sequence[str] | None) -> list[list[str]]:
    """The names of each tensor that `modules_to_save` trains and that has several."""
    every = names_of_each(model)
    tensors = {id(tensor_of(model, name)): None for name in saved_names(model, names)}
    return [group for tensor in tensors if len(group := every.get(tensor, [])) > 1]


def keeps_ties(model: nn.Module, adapter: str, config: AdapterConfig, layers: Mapping[str, LoRA]) -> bool:
    """What a file says of `ensure_weight_tying`: it was asked for, or the adapter trains a tied tensor; and PEFT then computes the same."""
    groups = tied_groups(model, config.modules_to_save)
    if not groups and not config.ensure_weight_tying:
        return False
    return all(_peft_ties(model, names) for names in groups) and _pairs_are_tied(model, adapter, layers)


def _peft_ties(model: nn.Module, names: list[str]) -> bool:
    modules = [model.get_submodule(owner_of(name)) for name in names]
    heads = [module for module in modules if not isinstance(module, nn.Embedding)]
    return len(heads) == len(modules) - 1 and all(isinstance(head, nn.Linear) and head.bias is None for head in heads)


def _pairs_are_tied(model: nn.Module, adapter: str, layers: Mapping[str, LoRA]) -> bool:
    """PEFT gives the head the embedding's pair, transposed. Of ours that were trained on, each has gone its own way."""
    every = names_of_each(model)
    for path, layer in layers.items():
        others = [owner_of(name) for name in every.get(id(getattr(layer, "weight", None)), []) if owner_of(name) != path]
        if not all(owner in layers and _transposed(layer, layers[owner], adapter) for owner in others):
            return False
    return True


def _transposed(one: LoRA, other: LoRA, adapter: str) -> bool:
    pairs = (one.lora_A[adapter], other.lora_B[adapter]), (one.lora_B[adapter], other.lora_A[adapter])
    return all(left.shape == right.T.shape and torch.equal(whole(left.detach()), whole(right.detach()).T) for left, right in pairs)


# Reading ------------------------------------------------------------------------------------------------------------------------


def check_ties(model: nn.Module, config: AdapterConfig, in_file: Collection[str], folder: Path) -> None:
    """Raise LoraLabError where PEFT gave some modules of a tied tensor a copy and others not. in_file: names of the tensors there."""
    for names in tied_groups(model, config.modules_to_save):
        there, lacking = [name for name in names if name in in_file], [name for name in names if name not in in_file]
        if there and lacking:
            raise LoraLabError(f"{folder}: modules_to_save={list(config.modules_to_save or ())!r} has values for {there[0]!r} and none for "
                               f"{lacking[0]!r}, which are one tensor in this model: PEFT trained a copy of the one and left the other alone; "
                               f"{how_to_untie(model, there[0], lacking[0])}")  # fmt: skip


def how_to_untie(model: nn.Module, name: str, other: str) -> str:
    """The line that gives one of two names a tensor of its own."""
    module, owner = model.get_submodule(owner_of(name)), owner_of(name)
    if module is model.get_submodule(owner_of(other)):
        return f"untie them first, model.{owner} = copy.deepcopy(model.{owner})"
    return f"untie them first, model.{name} = torch.nn.Parameter(model.{name}.detach().clone()), and say so (config.tie_word_embeddings = False)"

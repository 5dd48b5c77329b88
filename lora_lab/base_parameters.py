"""Parameters of the model itself that an adapter trains along: biases (`bias="all" | "lora_only"`), whole modules (`modules_to_save`).

They stay where they are, and belong to one adapter at a time: `use`, `disabled` and `eject` put the values of the adapter that is active, or the
base's own, into the same Parameters and keep the others aside. So with the adapter off the model computes what it did before `inject`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .errors import LoraLabError, did_you_mean
from .paths import name_matches

BIASES = ("none", "all", "lora_only")
PREFIX = "base_model.model."  # of every path in PEFT's files; before a name in modules_to_save: the module of this path alone
Owner = str | None  # an adapter; None is the base


@dataclass
class BaseParameters:
    """names: adapter -> the parameters it trains. in_place: parameter -> whose values it holds. aside: (owner, parameter) -> values kept."""

    names: dict[str, tuple[str, ...]] = field(default_factory=dict)
    in_place: dict[str, Owner] = field(default_factory=dict)
    aside: dict[tuple[Owner, str], Tensor] = field(default_factory=dict)

    def add(self, adapter: str, starts: dict[str, Tensor]) -> None:
        """From now on the adapter has values of its own, which begin as these (see `base_values`)."""
        self.names[adapter] = tuple(starts)
        for name, values in starts.items():
            self.aside[adapter, name] = values
            self.in_place.setdefault(name, None)

    def owner(self, name: str, active: Sequence[str]) -> Owner:
        """Whose values belong into a parameter while these adapters are active."""
        owners = [adapter for adapter in active if name in self.names.get(adapter, ())]
        if len(owners) > 1:
            raise LoraLabError(f"{' and '.join(owners)} both train {name!r} itself, and it can hold one's values at a time: use one of them")
        return owners[0] if owners else None

    @torch.no_grad()
    def swap(self, model: nn.Module, active: Sequence[str]) -> None:
        """Put the right values into every such parameter. Raises LoraLabError, nothing changed, where two active adapters want one."""
        wanted = {name: self.owner(name, active) for name in self.in_place}
        changed = {name: tensor_of(model, name) for name, owner in wanted.items() if self.in_place[name] != owner}
        for name, parameter in changed.items():
            if parameter.shape != (values := self.aside[wanted[name], name]).shape:
                owner = wanted[name] or "the base"
                raise LoraLabError(f"{name!r} is {list(parameter.shape)} now, its values kept for {owner} are {list(values.shape)}: it was resized "
                                   "after inject; resize it back, eject, and resize before inject")  # fmt: skip
        kept = {name: parameter.detach().clone() for name, parameter in changed.items()}
        for name, parameter in changed.items():
            self.aside[self.in_place[name], name] = kept[name]
            parameter.copy_(self.aside.pop((wanted[name], name)))
            self.in_place[name] = wanted[name]

    def mark(self, model: nn.Module, names: Iterable[str], trainable: bool) -> None:
        """These parameters train, or do not; a buffer never does."""
        for name in names:
            if isinstance(parameter := tensor_of(model, name), nn.Parameter):
                parameter.requires_grad_(trainable)


def injections(model: nn.Module) -> list[tuple[nn.Module, Any]]:
    """The `Injection`s of a model, and of every module in it that `inject` was called with."""
    return [(owner, injection) for owner in model.modules() if (injection := vars(owner).get("lora_injection")) is not None]


def base_parameters_of(model: nn.Module) -> list[tuple[nn.Module, BaseParameters]]:
    return [(owner, injection.base_parameters) for owner, injection in injections(model)]


def refuse_base_parameters(model: nn.Module, adapters: Iterable[str], why: str) -> None:
    """Raise LoraLabError for the first of these adapters that trains something of the model itself, wherever in it it was injected."""
    for _, base_parameters in base_parameters_of(model):
        for name in adapters:
            if base_parameters.names.get(name):
                raise LoraLabError(f"{name!r} trains {base_parameters.names[name][0]!r} of the model itself, {why}")


Owners = list[tuple[nn.Module, BaseParameters, tuple[str, ...]]]


def owners_in_place(model: nn.Module) -> Owners:
    """Whose values are in place now, for `restore_owners`."""
    records = base_parameters_of(model)
    return [(owner, record, tuple(dict.fromkeys(name for name in record.in_place.values() if name is not None))) for owner, record in records]


def swap_base_parameters(model: nn.Module, active: Sequence[str]) -> None:
    """Put the values of these adapters, or the base's, in place. Raises LoraLabError, nothing changed, where two of them want one parameter."""
    restore_owners([(owner, record, tuple(active)) for owner, record in base_parameters_of(model)])


def restore_owners(moment: Owners) -> None:
    """Of several records every one gives back what it does not keep before any takes its own: one may lie inside another."""
    wanted = [{name: record.owner(name, active) for name in record.in_place} for _, record, active in moment]
    moved = [entry for entry, owners in zip(moment, wanted, strict=True) if owners != entry[1].in_place]
    for owner, record, _ in reversed(moved) if len(moved) > 1 else ():
        record.swap(owner, ())
    for owner, record, active in moved:
        record.swap(owner, active)


@contextlib.contextmanager
def base_in_place(model: nn.Module) -> Iterator[None]:
    """Inside the block every such parameter holds the base's values."""
    before = owners_in_place(model)
    swap_base_parameters(model, ())
    try:
        yield
    finally:
        restore_owners(before)


def base_values(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Copies of the base's own values."""
    with base_in_place(model):
        return {name: tensor_of(model, name).detach().clone() for name in names}


def tensor_of(model: nn.Module, name: str) -> Tensor:
    """A parameter of the model, or one of its buffers: BatchNorm's running statistics move in training, too."""
    owner, _, last = name.rpartition(".")
    tensor = getattr(model.get_submodule(owner), last)
    assert isinstance(tensor, Tensor)
    return tensor


def base_parameter_names(model: nn.Module, targets: Sequence[str], bias: str, modules_to_save: Sequence[str] | None) -> tuple[str, ...]:
    """The parameters a request trains along, a tied one by its first name. targets: paths of the adapted layers.

    Raises LoraLabError for a module that is not there, a bias that no layer has, an unknown word.
    """
    if bias not in BIASES:
        raise LoraLabError(f"bias={bias!r}: expected one of {', '.join(BIASES)}{did_you_mean(bias, BIASES)}")
    biases = biases_of(model, targets, bias)
    if bias != "none" and not biases:
        raise LoraLabError(f"bias={bias!r}: {'the adapted layers have' if bias == 'lora_only' else 'this model has'} no bias")
    saved = saved_names(model, modules_to_save)
    once = {id(tensor_of(model, name)): name for name in reversed([*biases, *saved])}
    return tuple(reversed(once.values()))


def biases_of(model: nn.Module, targets: Collection[str], bias: str) -> list[str]:
    """The biases that bias="none" | "all" | "lora_only" means, by name."""
    present = [name for name, _ in model.named_parameters() if not of_an_adapter(name)]
    found = [name for name in present if name.rpartition(".")[2] == "bias"]
    return [name for name in found if bias == "all" or (bias == "lora_only" and name.rpartition(".")[0] in targets)]


def saved_names(model: nn.Module, modules_to_save: Sequence[str] | None) -> list[str]:
    """The parameters of the modules that are trained whole, and their buffers that a file keeps.

    Raises LoraLabError for a quantised one, of which only a bias would train.
    """
    names = []
    for path in modules_of(model, modules_to_save):
        module = model.get_submodule(path)
        if quantised := [f"{path}.{name}".strip(".") for name, part in module.named_modules() if hasattr(part, "quantization")]:
            raise LoraLabError(f"modules_to_save={list(modules_to_save or ())!r}: {quantised[0]!r} is quantised, and codes do not train: adapt it, "
                               "or leave it out of `quantize`")  # fmt: skip
        kept = module.state_dict()
        parameters = module.named_parameters(remove_duplicate=False)  # a file has what is tied inside a module under each of its names
        own = [*(name for name, _ in parameters), *(name for name, _ in module.named_buffers(remove_duplicate=False) if name in kept)]
        names += [f"{path}.{name}" for name in own if not of_an_adapter(name)]
    return names


def names_of_each(model: nn.Module) -> dict[int, list[str]]:
    """id of a parameter -> every name that leads to it: more than one where it is tied."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not of_an_adapter(name):
            names.setdefault(id(parameter), []).append(name)
    return names


def of_an_adapter(name: str) -> bool:
    """Whether a parameter's name is that of some adapter's, not of the model itself."""
    return ".lora_" in f".{name}"


def modules_of(model: nn.Module, names: Sequence[str] | None) -> list[str]:
    """Paths of the modules that `modules_to_save` names, at dots from the right; one behind `PREFIX` is a whole path."""
    check_modules_to_save(names)
    paths = paths_with_parameters(model)
    for name in names or ():
        if not any(named_at_dots(path, name) for path in paths):
            near = did_you_mean(name, {path.rpartition(".")[2] for path in paths})
            raise LoraLabError(f"modules_to_save={list(names or ())!r}: {name!r} matches no module with parameters{near}")
    return [path for path in paths if any(named_at_dots(path, name) for name in names or ())]


def paths_with_parameters(model: nn.Module) -> list[str]:
    """Of the modules of the model itself, a tied one by each of its paths."""
    modules = model.named_modules(remove_duplicate=False)
    return [path for path, module in modules if path and not of_an_adapter(path) and next(module.parameters(), None) is not None]


def named_at_dots(path: str, name: str) -> bool:
    """
    >>> named_at_dots("model.norm", "norm"), named_at_dots("model.norm", "base_model.model.norm"), named_at_dots("x.pre_norm", "norm")
    (True, False, False)
    """
    return PREFIX + path == name if name.startswith(PREFIX) else name_matches(name, path)


def check_modules_to_save(names: Any) -> None:
    several = names is None or (isinstance(names, (Sequence, set, frozenset)) and not isinstance(names, str))
    if not several or not all(isinstance(name, str) for name in names or ()):
        hint = f", [{names!r}]" if isinstance(names, str) else ""
        raise LoraLabError(f"modules_to_save={names!r}: expected a list of names{hint}")

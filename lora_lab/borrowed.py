"""Parameters of the model itself that an adapter trains along: biases (`bias="all" | "lora_only"`), whole modules (`modules_to_save`).

They stay where they are, and belong to one adapter at a time: `use`, `disabled` and `eject` put the values of the adapter that is active, or the
base's own, into the same Parameters and keep the others aside. So with the adapter off the model computes what it did before `inject`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .errors import LoraLabError, did_you_mean

BIASES = ("none", "all", "lora_only")
Owner = str | None  # an adapter; None is the base


@dataclass
class Borrowed:
    """names: adapter -> the parameters it trains. in_place: parameter -> whose values it holds. aside: (owner, parameter) -> values kept."""

    names: dict[str, tuple[str, ...]] = field(default_factory=dict)
    in_place: dict[str, Owner] = field(default_factory=dict)
    aside: dict[tuple[Owner, str], Tensor] = field(default_factory=dict)

    def add(self, model: nn.Module, adapter: str, names: Iterable[str]) -> None:
        """From now on the adapter has values of its own, which begin as the base's."""
        self.names[adapter] = tuple(names)
        for name in self.names[adapter]:
            base = model.get_parameter(name) if self.in_place.get(name) is None else self.aside[None, name]
            self.aside[adapter, name] = base.detach().clone()
            self.in_place.setdefault(name, None)

    def owner(self, name: str, active: Sequence[str]) -> Owner:
        """Whose values belong into a parameter while these adapters are active."""
        owners = [adapter for adapter in active if name in self.names.get(adapter, ())]
        if len(owners) > 1:
            raise LoraLabError(f"{' and '.join(owners)} both train {name!r} itself, and it can hold one's values at a time: use one of them")
        return owners[0] if owners else None

    @torch.no_grad()
    def swap(self, model: nn.Module, active: Sequence[str]) -> None:
        """Put the right values into every borrowed parameter. Raises LoraLabError, nothing changed, where two active adapters want one."""
        wanted = {name: self.owner(name, active) for name in self.in_place}
        for name, owner in wanted.items():
            if (before := self.in_place[name]) != owner:
                parameter = model.get_parameter(name)
                self.aside[before, name] = parameter.detach().clone()
                parameter.copy_(self.aside.pop((owner, name)))
                self.in_place[name] = owner

    def mark(self, model: nn.Module, active: Sequence[str]) -> None:
        """The active adapters' parameters train."""
        for adapter in active:
            for name in self.names.get(adapter, ()):
                model.get_parameter(name).requires_grad_(True)


def borrowed_of(model: nn.Module) -> Borrowed | None:
    """The record of a model; None where nothing was injected at this level."""
    injection = vars(model).get("lora_injection")
    return None if injection is None else injection.borrowed


def swap_borrowed(model: nn.Module, active: Sequence[str]) -> None:
    """Put the values of these adapters, or the base's, in place, where there are any."""
    if (borrowed := borrowed_of(model)) is not None:
        borrowed.swap(model, active)


def active_borrowers(model: nn.Module) -> tuple[str, ...]:
    """The adapters whose values are in place."""
    owners = () if (borrowed := borrowed_of(model)) is None else borrowed.in_place.values()
    return tuple(dict.fromkeys(owner for owner in owners if owner is not None))


def borrowed_names(model: nn.Module, targets: Sequence[str], bias: str, modules_to_save: Sequence[str] | None) -> tuple[str, ...]:
    """The parameters a request trains along, a tied one by its first name. targets: paths of the adapted layers.

    Raises LoraLabError for a module that is not there, a bias that no layer has, an unknown word.
    """
    if bias not in BIASES:
        raise LoraLabError(f"bias={bias!r}: expected one of {', '.join(BIASES)}{did_you_mean(str(bias), BIASES)}")
    present = [name for name, _ in model.named_parameters() if ".lora_" not in f".{name}"]
    biases = [name for name in present if name.rpartition(".")[2] == "bias" and (bias == "all" or name.rpartition(".")[0] in targets)]
    if bias != "none" and not biases:
        raise LoraLabError(f"bias={bias!r}: {'the adapted layers have' if bias == 'lora_only' else 'this model has'} no bias")
    saved = [f"{path}.{name}" for path in modules_of(model, modules_to_save) for name, _ in model.get_submodule(path).named_parameters()]
    once = {id(model.get_parameter(name)): name for name in reversed([*(biases if bias != "none" else []), *saved])}
    return tuple(reversed(once.values()))


def modules_of(model: nn.Module, names: Sequence[str] | None) -> list[str]:
    """Paths of the modules that `modules_to_save` names, at dots from the right."""
    if isinstance(names, str):
        raise LoraLabError(f"modules_to_save={names!r}: expected a list of names, [{names!r}]")
    paths = [path for path, module in model.named_modules(remove_duplicate=False) if path and next(module.parameters(), None) is not None]
    for name in names or ():
        if not any(path == name or path.endswith(f".{name}") for path in paths):
            near = did_you_mean(str(name), {path.rpartition(".")[2] for path in paths})
            raise LoraLabError(f"modules_to_save={list(names or ())!r}: {name!r} matches no module with parameters{near}")
    return [path for path in paths if any(path == name or path.endswith(f".{name}") for name in names or ())]

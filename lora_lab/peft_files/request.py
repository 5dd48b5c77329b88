"""The layers that a configuration names, found in the model as PEFT finds them, and compared with those that the file has tensors of.

    target_modules         a list of names at dots from the right, a regular expression over the whole path, or "all-linear"
    layers_to_transform    of these names, the layers with these numbers; layers_pattern: what stands before the number
    exclude_modules        names or a regular expression that come first
    modules_to_save        no adapters in these

PEFT warns of named layers without tensors, and passes by the tensors of others: neither is the adapter that was trained. Where its versions
differ (the number of a layer whose path has several, a classifier under "all-linear"), a layer may have tensors and need not.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..base_parameters import names_of_each, of_an_adapter
from ..errors import LoraLabError
from ..kinds import is_linear, kind_of
from ..paths import name_matches
from ..patterns import compile_pattern
from ..targets import is_head
from .config import CONFIG
from .ties import owner_of

ALL_LINEAR = "all-linear"
Names = str | tuple[str, ...]


@dataclass(frozen=True)
class Request:
    """targets, excluded: a regular expression, or names.  whole: modules_to_save.  layers: numbers, none for all.  before: layers_pattern."""

    targets: Names
    excluded: Names = ()
    whole: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    before: tuple[str, ...] = ()

    @functools.cached_property
    def expressions(self) -> dict[Names, re.Pattern[str]]:
        """Those of targets and excluded that are expressions, compiled once: they may name every layer."""
        linear = isinstance(self.targets, str) and self.targets.lower() == ALL_LINEAR  # a word of target_modules alone
        given = [self.excluded] if linear else [self.targets, self.excluded]
        return {each: compile_pattern(each, "target_modules or exclude_modules") for each in given if isinstance(each, str)}

    def means(self, model: nn.Module, path: str, module: nn.Module) -> bool | None:
        """Whether a layer has an adapter; None where that depends on PEFT's version."""
        whole = (compile_pattern(name, "modules_to_save", r"(^|.*\.)", r"($|\..*)") for name in self.whole)
        if self._matches(self.excluded, path) or any(pattern.match(path) for pattern in whole):
            return False
        if isinstance(self.targets, str) and self.targets.lower() == ALL_LINEAR:
            return is_linear(module) and (None if is_head(model, path, module) else True)
        if isinstance(self.targets, str) or path in self.targets or not self.layers:
            return self._matches(self.targets, path)
        return self._matches(self.targets, path) and self.in_its_layers(path)

    def _matches(self, names: Names, path: str) -> bool:
        if isinstance(names, str):
            return self.expressions[names].fullmatch(path) is not None
        return any(name_matches(name, path) for name in names)

    def in_its_layers(self, path: str) -> bool | None:
        """Of several numbers in a path PEFT takes the first, older versions took the last."""
        answers = {self._number(path, before) in self.layers for before in (".*?", ".*")}
        return answers.pop() if len(answers) == 1 else None

    def _number(self, path: str, before: str) -> int | None:
        patterns = [(rf"(?:^|{before}\.)", pattern) for pattern in self.before] or [(rf"{before}\.", "[^.]*")]
        found = (compile_pattern(pattern, "layers_pattern", begin, r"\.(?P<number>\d+)\.").match(path) for begin, pattern in patterns)
        return next((int(match["number"]) for match in found if match), None)


def read_request(written: dict[str, Any], path: Path) -> Request | None:
    """None where the configuration says nothing of layers. path: of the file, for messages. Raises LoraLabError for a setting of another type."""
    if written.get("target_modules") is None and not written.get("target_parameters"):
        return None
    layers = written.get("layers_to_transform")
    layers = () if layers is None else (layers,) if isinstance(layers, int) else tuple(layers) if isinstance(layers, list) else ("?",)
    if not all(isinstance(number, int) for number in layers):
        raise LoraLabError(f"{path}: layers_to_transform={written['layers_to_transform']!r}: expected a list of layer numbers")
    targets, excluded, before = (_names(written, key, path) for key in ("target_modules", "exclude_modules", "layers_pattern"))
    whole = tuple(written.get("modules_to_save") or ())
    return Request(targets, excluded, whole, layers, ((before,) if before else ()) if isinstance(before, str) else before)


def _names(written: dict[str, Any], key: str, path: Path) -> Names:
    value = written.get(key) or ()
    if isinstance(value, str):
        return value
    if not isinstance(value, (list, tuple)) or not all(isinstance(name, str) for name in value):
        raise LoraLabError(f"{path}: {key}={value!r}: expected a list of names, or a regular expression")
    return tuple(value)


# The comparison -------------------------------------------------------------------------------------------------------------------


def check_request(model: nn.Module, written: dict[str, Any], found: Collection[str], folder: Path) -> None:
    """Raise LoraLabError where the layers that are named are not those that have tensors. found: paths of the latter."""
    if (request := read_request(written, folder / CONFIG)) is None:
        return
    needed, allowed = _named(model, request)
    here = {id(model.get_submodule(path)) for path in found}
    said = f"target_modules={written.get('target_modules')!r}"
    if missing := [path for one, path in needed.items() if one not in here]:
        raise LoraLabError(f"{folder}: {said} names {_some(missing)}, of which the file has no tensors: it is incomplete, or an adapter for another "
                           "model")  # fmt: skip
    allowed |= _tied_with(model, allowed) if written.get("ensure_weight_tying") else set()
    if more := sorted(path for path in found if id(model.get_submodule(path)) not in allowed):
        raise LoraLabError(f"{folder} has tensors for {_some(more)}, which {said} in {CONFIG} does not name, so that PEFT passes them by: the two "
                           "files do not belong together")  # fmt: skip


def _named(model: nn.Module, request: Request) -> tuple[dict[int, str], set[int]]:
    """(id -> path of the layers that are to have tensors, ids of those that may). Of a layer with several paths PEFT sees the first."""
    needed: dict[int, str] = {}
    seen, allowed = set[int](), set[int]()
    for path, module in model.named_modules(remove_duplicate=False):
        if not path or of_an_adapter(path) or kind_of(module) is None:
            continue
        answer = request.means(model, path, module)
        parts = {path: module, **({f"{path}.out_proj": module.out_proj} if isinstance(module, nn.MultiheadAttention) else {})}
        allowed |= {id(part) for part in parts.values() if answer is not False}
        needed |= {id(part): name for name, part in parts.items() if answer and id(module) not in seen}
        seen.add(id(module))
    return needed, allowed


def _tied_with(model: nn.Module, layers: set[int]) -> set[int]:
    """The layers that share a weight with one of these: PEFT ties their adapters, too."""
    groups = [[id(model.get_submodule(owner_of(name))) for name in names] for names in names_of_each(model).values() if len(names) > 1]
    return {one for group in groups if layers.intersection(group) for one in group}


def _some(paths: list[str]) -> str:
    return ", ".join(map(repr, paths[:3])) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")

"""Adapters of parameters in PEFT's files, which do not name the parameter: PEFT wraps the module once for each, so that they differ by position.

    experts.base_layer.lora_A.weight [n r, in]    the first of two adapted parameters, in the order in which the module has them
    experts.lora_A.weight                         the last
    experts.base_layer.base_layer.<more>          anything else below the module: its own biases, layers in it

Ours say the order besides, in the metadata of the tensors, `lora_lab_parameters`: {module: {"names": [...], "transposed": false}}.
A stack has its matrices in one: A [n r, in], those of a matrix one below the other; B [out, r n], whose columns go through the n first.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor, nn

from ..errors import LoraLabError
from ..files import json_object
from ..layers import LoRA
from ..parameters.layer import PART, ParameterLoRA, parameter_path, part_at
from ..parameters.targets import match_parameters, own_parameters
from ..paths import name_matches

if TYPE_CHECKING:
    from ..plans import PlannedLayer

WRAPPED = "base_layer."
DESCRIBED = "lora_lab_parameters"  # in the metadata
WRAPPED_PAIR = re.compile(r"(?P<owner>.+?)(?P<wrapped>(\.base_layer)*)\.lora_(?P<which>[AB])\.weight")
OF_THE_PAIR = re.compile(r"lora_[AB]\.weight")
T = TypeVar("T")
Owners = dict[str, list[str]]  # path of a module -> its adapted parameters, in the order in which it has them


def owners_of(model: nn.Module, paths: Iterable[str]) -> Owners:
    owners: Owners = {}
    for path in paths:
        owner, _, name = path.rpartition(".")
        owners.setdefault(owner, []).append(name)
    return {owner: sorted(names, key=list(model.get_submodule(owner)._parameters).index) for owner, names in owners.items()}


def parameters_for_file(model: nn.Module, tensors: Mapping[str, Tensor], layers: Mapping[str, LoRA], prefix: str) -> dict[str, Tensor]:
    """The tensors of a file under PEFT's names. layers: those of the adapter, by path."""
    owners = owners_of(model, (parameter_path(path) for path, layer in layers.items() if isinstance(layer, ParameterLoRA)))
    if "" in owners:
        raise LoraLabError(f"{owners[''][0]!r} is a parameter of the model that is saved, which PEFT's files cannot name: inject into a model that "
                           "contains it, nn.Sequential(model) will do")  # fmt: skip
    return {prefix + _in_file(key.removeprefix(prefix), owners): tensor for key, tensor in tensors.items()}


def parameters_in_metadata(model: nn.Module, layers: Mapping[str, LoRA]) -> dict[str, str]:
    """The metadata of an adapter: empty where it is on no parameter."""
    paths = [parameter_path(path) for path, layer in layers.items() if isinstance(layer, ParameterLoRA)]
    described = {
        owner: {"names": names, "transposed": bool(getattr(model.get_submodule(owner), "is_transposed", False))}
        for owner, names in owners_of(model, paths).items()
    }
    return {DESCRIBED: json.dumps(described, sort_keys=True)} if described else {}


def described_in(metadata: Mapping[str, str]) -> dict[str, Any]:
    """What our files say of the modules whose parameters they adapt; nothing in PEFT's."""
    described = json_object(metadata[DESCRIBED], Path(DESCRIBED)) if DESCRIBED in metadata else {}
    for owner, saved in described.items():
        names = saved.get("names") if isinstance(saved, dict) else None
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names) or "transposed" not in saved:
            raise LoraLabError(f"{DESCRIBED} in the metadata has {saved!r:.80} for {owner!r}: expected the names of its parameters, and 'transposed'")
    return described


def _in_file(key: str, owners: Owners) -> str:
    for owner in sorted(owners, key=len, reverse=True):  # from the inside: the names of outer ones stay as they are
        if key.startswith(f"{owner}."):
            rest, names = key.removeprefix(f"{owner}."), owners[owner]
            part = next((name for name in names if rest.startswith(f"{PART}{name}.")), None)
            depth = len(names) if part is None else len(names) - 1 - names.index(part)
            key = f"{owner}.{WRAPPED * depth}{rest if part is None else rest.removeprefix(f'{PART}{part}.')}"
    return key


def parameters_from_file(
    model: nn.Module, tensors: dict[str, Tensor], names: Iterable[str] | None, metadata: Mapping[str, str], prefix: str, folder: Path
) -> dict[str, Tensor]:
    """The tensors of a file by the path of their parameter, "experts.down_proj.lora_A.weight", stacks as stacks. names: its target_parameters.

    Raises LoraLabError for a name that matches nothing here, or of which there are no tensors, and where the module says otherwise how stacks lie.
    """
    if not names:
        return tensors
    try:
        owners = owners_of(model, match_parameters(model, names))
    except LoraLabError as error:
        raise LoraLabError(f"{folder} is an adapter for another model: {error}") from None
    owners = _as_described(model, owners, metadata, folder)
    renamed = {prefix + _in_model(key.removeprefix(prefix), owners): tensor for key, tensor in tensors.items()}
    for owner, name in ((owner, name) for owner, own in owners.items() for name in own):
        if f"{prefix}{owner}.{name}.lora_A.weight" not in renamed:
            raise LoraLabError(f"{folder}: target_parameters={list(names)!r} names '{owner}.{name}', of which the file has no tensors: it is "
                               "incomplete, or an adapter for another model")  # fmt: skip
    return {key: _unpacked(model, key.removeprefix(prefix), tensor) for key, tensor in renamed.items()}


def _as_described(model: nn.Module, owners: Owners, metadata: Mapping[str, str], folder: Path) -> Owners:
    """In the order of the module that was saved, where the file says it."""
    for owner, saved in described_in(metadata).items():
        if sorted(saved["names"]) != sorted(owners.get(owner, ())):
            raise LoraLabError(f"{folder}: its metadata have adapters of {saved['names']} in {owner!r}, its configuration of {owners.get(owner)}")
        if saved["transposed"] != bool(getattr(model.get_submodule(owner), "is_transposed", False)):
            raise LoraLabError(f"{folder}: {owner!r} was saved with is_transposed={saved['transposed']}, and is not so here: another model")
        owners[owner] = saved["names"]
    return owners


def _in_model(key: str, owners: Owners) -> str:
    for owner in sorted(owners, key=len):  # from the outside, as the names of inner ones lead through outer ones
        if key.startswith(f"{owner}."):
            rest, names = key.removeprefix(f"{owner}."), owners[owner]
            depth = 0
            while rest.startswith(WRAPPED):
                depth, rest = depth + 1, rest.removeprefix(WRAPPED)
            if depth < len(names) and OF_THE_PAIR.fullmatch(rest):
                rest = f"{names[len(names) - 1 - depth]}.{rest}"
            elif depth > len(names):
                rest = WRAPPED * (depth - len(names)) + rest
            key = f"{owner}.{rest}"
    return key


def _unpacked(model: nn.Module, key: str, tensor: Tensor) -> Tensor:
    """A stack's [n r, in] as [n, r, in], its [out, r n] as [n, out, r]; another shape is left for the check of shapes."""
    path, _, which = key.rpartition(".lora_")
    part = part_at(model, path) if OF_THE_PAIR.fullmatch(f"lora_{which}") else None
    if part is None or part.weight.ndim != 3 or tensor.ndim != 2:
        return tensor
    n, dim = len(part.weight), "AB".index(which[0])
    if tensor.shape[dim] % n:
        return tensor
    return tensor.unflatten(0, (n, -1)) if dim == 0 else tensor.unflatten(1, (-1, n)).permute(2, 0, 1)


def short_names(model: nn.Module, paths: Iterable[str]) -> list[str]:
    """The shortest names that PEFT's matching resolves to exactly these parameters. Raises LoraLabError where there are none."""
    wanted, present = set(paths), own_parameters(model)
    for parts in (1, 2, 1_000):
        names = sorted({".".join(path.split(".")[-parts:]) for path in wanted})
        if {path for path in present if any(name_matches(name, path) for name in names)} == wanted:
            return names
    raise LoraLabError(f"the adapted parameters {', '.join(sorted(wanted))} cannot be named in a PEFT file: a name there means every parameter whose "
                       "path ends with it")  # fmt: skip


def check_pair(folder: Path, planned: PlannedLayer, part: ParameterLoRA, named: Mapping[str, Tensor]) -> None:
    """Raises LoraLabError where A and B in a file do not fit the parameter."""
    wanted = dict(zip(part.lora_kind.names, part.lora_kind.pair_shapes(part, planned.rank), strict=True))
    if {name: tuple(tensor.shape) for name, tensor in named.items()} != wanted:
        found = " and ".join(f"{name} {list(tensor.shape)}" for name, tensor in named.items())
        raise LoraLabError(f"{folder}: of the parameter {planned.path!r} {list(part.weight.shape)} it has {found}, but with rank {planned.rank} "
                           f"(adapter_config.json) that needs {' and '.join(str(list(shape)) for shape in wanted.values())}: another model, or a "
                           "wrong rank")  # fmt: skip


# Without a model ------------------------------------------------------------------------------------------------------------------


def wrapped_pairs(tensors: Mapping[str, T], names: Iterable[str] | None, prefix: str) -> tuple[dict[str, dict[int, dict[str, T]]], dict[str, T]]:
    """A file in two: pairs that may be of parameters, by module and depth, and the rest. A name without a module may be of any."""
    owners, wrapped, rest = {name.rpartition(".")[0] for name in names or ()}, dict[str, dict[int, dict[str, T]]](), dict[str, T]()
    for key, tensor in tensors.items():
        match = WRAPPED_PAIR.fullmatch(key.removeprefix(prefix))
        owner = without_wrappers(match["owner"]) if match else ""
        if match and key.startswith(prefix) and any(not name or name_matches(name, owner) for name in owners):
            wrapped.setdefault(owner, {}).setdefault(match["wrapped"].count("base"), {})[match["which"]] = tensor
        else:
            rest[key] = tensor
    return wrapped, rest


def without_wrappers(name: str) -> str:
    """A name in a file as the model's.

    >>> without_wrappers("block.base_layer.base_layer.proj.base_layer.bias")
    'block.proj.bias'
    """
    return re.sub(r"(\.base_layer)+(?=\.|$)", "", name)

"""Adapters of parameters merged into a checkpoint: which tensor of the base each of them is for, and what changes there.

A stack of experts is one tensor in some files (GPT-OSS, Llama 4) and one for each expert and projection in others (Mixtral, Qwen, OLMoE, ...):

    experts.gate_up_proj [n, 2 inner, width]    experts.0.gate_proj.weight, experts.0.up_proj.weight, experts.1...    (w1 and w3 of Mixtral)
    experts.down_proj [n, width, inner]         experts.0.down_proj.weight, ...                                       (w2)

An adapter file tells the parameters of a module apart by position alone (peft_files/parameters.py). Ours say the order in their metadata; of
PEFT's it is found by the shapes, and where several orders fit, gate_up_proj comes before down_proj, as PEFT's own conversion has it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ..errors import LoraLabError, did_you_mean
from ..paths import name_matches
from ..peft_files.folder import AdapterFile, Pair, plain_pair
from .blockwise import Change
from .shards import StoredTensor

PROJECTIONS = {  # of a stack: those of one expert, one below the other
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")), "up_proj": (("up_proj",),), "down_proj": (("down_proj",), ("w2",)),
}  # fmt: skip
RENAMED = (("", ""), (".mlp.", ".block_sparse_moe."), (".mlp.", ".feed_forward."))  # in the model, in files
TRANSPOSED = ("gpt_oss", "openai_privacy_filter", "aria", "aria_text")  # stacks [n, in, out]
STRAIGHT = ("llama4", "llama4_text")  # to PEFT, as their modules do not say otherwise
Wrapped = dict[int, dict[str, StoredTensor]]  # depth -> "A", "B"


@dataclass(frozen=True)
class _Place:
    """Where a parameter is in the base. keys: [n][projections], of a tensor of its own [[key]]."""

    keys: tuple[tuple[str, ...], ...]
    shape: tuple[int, ...]
    whole: bool


@dataclass(frozen=True)
class _Rows(StoredTensor):
    """Rows first to last of a matrix in a file, and of its columns every step-th from `column` on."""

    first: int = 0
    last: int = 0
    column: int = 0
    step: int = 1

    def read(self, start: int | None = None, stop: int | None = None) -> Tensor:
        return super().read(self.first, self.last)[:, self.column :: self.step]


def place_parameters(adapter: AdapterFile, base: dict[str, StoredTensor], config: dict[str, Any]) -> tuple[AdapterFile, dict[str, Change]]:
    """The adapter without what is on parameters, and what that changes: base's tensor -> change.

    Raises LoraLabError for a parameter without a place or without tensors, for shapes that do not fit, and where the order of several, or the
    orientation of a square stack, cannot be told.
    """
    names = adapter.settings.target_parameters or ()
    places = {owner: _places(owner, names, base) for owner in adapter.wrapped}
    layers = {owner for owner, wrapped in adapter.wrapped.items() if not places[owner] and set(wrapped) == {0}}
    used = {name for name in names for owner, own in places.items() for leaf in own if name_matches(name, f"{owner}.{leaf}")}
    if unused := sorted(set(names) - used):
        raise LoraLabError(f"target_parameters={list(names)!r}: of {unused[0]!r} the adapter has no tensors, or the base no parameter"
                           f"{did_you_mean(unused[0], base)}: merge in memory, with the model")  # fmt: skip
    changes: dict[str, Change] = {}
    for owner in (owner for owner in adapter.wrapped if owner not in layers):
        for key, change in _changes_of(owner, adapter.wrapped[owner], places[owner], adapter, base, config):
            if key in changes:
                raise LoraLabError(f"two of the adapter's parameters are {key!r} in the base: merge in memory, with the model")
            changes[key] = change
    plain = {owner: plain_pair(owner, adapter.wrapped[owner][0], adapter.settings) for owner in adapter.wrapped if owner in layers}
    return replace(adapter, pairs=adapter.pairs | plain, wrapped={}), changes


def _places(owner: str, names: Sequence[str], base: dict[str, StoredTensor]) -> dict[str, _Place]:
    """Where the parameters of a module are that target_parameters may mean."""
    leaves = dict.fromkeys(leaf for name in names if name_matches(name, f"{owner}.{(leaf := name.rpartition('.')[2])}"))
    return {leaf: place for leaf in leaves if (place := _place(f"{owner}.{leaf}", base)) is not None}


def _place(path: str, base: dict[str, StoredTensor]) -> _Place | None:
    """As it is called in the model, or as files call it: with or without one leading name, and with Mixtral's name for the block."""
    first = dict.fromkeys(name.partition(".")[0] for name in base)
    paths = [path.replace(old, new) for old, new in RENAMED if old in path]
    for candidate in itertools.chain(paths, (p.partition(".")[2] for p in paths), (f"{name}.{p}" for name in first for p in paths)):
        if candidate in base:
            return _Place(((candidate,),), base[candidate].shape, True)
        owner, _, leaf = candidate.rpartition(".")
        for projections in PROJECTIONS.get(leaf, ()):
            if (place := _by_expert(owner, projections, base)) is not None:
                return place
    return None


def _by_expert(owner: str, projections: tuple[str, ...], base: dict[str, StoredTensor]) -> _Place | None:
    keys: list[tuple[str, ...]] = []
    while all(f"{owner}.{len(keys)}.{name}.weight" in base for name in projections):
        keys.append(tuple(f"{owner}.{len(keys)}.{name}.weight" for name in projections))
    shapes = [[base[key].shape for key in expert] for expert in keys]
    if not shapes or any(one != shapes[0] for one in shapes) or any(len(shape) != 2 for shape in shapes[0]):
        return None
    return _Place(tuple(keys), (len(keys), sum(rows for rows, _ in shapes[0]), shapes[0][0][1]), False)


def _changes_of(owner: str, wrapped: Wrapped, places: dict[str, _Place], adapter: AdapterFile, base: dict[str, StoredTensor],
                config: dict[str, Any]) -> Iterator[tuple[str, Change]]:  # fmt: skip
    described = adapter.described.get(owner, {})
    for leaf, pair in _in_order(owner, wrapped, places, adapter, described).items():
        place, scaling = places[leaf], adapter.settings.scaling_of(f"{owner}.{leaf}")
        if len(place.shape) == 2:
            yield place.keys[0][0], Change(pair=pair, scaling=scaling)
        elif place.whole:
            turned = _is_transposed(f"{owner}.{leaf}", pair, place, described, config)
            yield place.keys[0][0], Change(pair=pair, scaling=scaling, transposed=turned, stack=place.shape[0])
        else:
            yield from _of_experts(pair, place, base, scaling)


def _of_experts(pair: Pair, place: _Place, base: dict[str, StoredTensor], scaling: float) -> Iterator[tuple[str, Change]]:
    """A [n r, in] and B [out, r n] of a stack, cut for each expert and each of its projections."""
    n, (A, B) = len(place.keys), (pair.A, pair.B)
    rank = A.shape[0] // n
    for expert, keys in enumerate(place.keys):
        own_A, row = _Rows(A.file, A.key, A.dtype, (rank, *A.shape[1:]), expert * rank, (expert + 1) * rank), 0
        for key in keys:
            out = base[key].shape[0]
            own_B = _Rows(B.file, B.key, B.dtype, (out, rank), row, row + out, expert, n)
            yield key, Change(pair=Pair(own_A, own_B, None, None, False), scaling=scaling)
            row += out


def _in_order(owner: str, wrapped: Wrapped, places: dict[str, _Place], adapter: AdapterFile, described: dict[str, Any]) -> dict[str, Pair]:
    """Which of a module's parameters each pair is for: the innermost is the first that the module has."""
    missing = [depth for depth in range(len(places)) if set(wrapped.get(depth, {})) != {"A", "B"}]
    if missing or len(wrapped) != len(places):
        raise LoraLabError(f"{owner!r} has adapters for {len(wrapped)} parameters in the file, and {', '.join(places) or 'none'} in the base: it is "
                           "incomplete, or an adapter of another model")  # fmt: skip
    pairs = [Pair(wrapped[depth]["A"], wrapped[depth]["B"], None, None, False) for depth in sorted(wrapped, reverse=True)]
    known = described.get("names")
    orders = [tuple(known)] if known and set(known) == set(places) else list(itertools.permutations(places))
    fits = {leaf: [_fits(f"{owner}.{leaf}", pair, place, adapter) for pair in pairs] for leaf, place in places.items()}
    fitting = [order for order in orders if all(fits[leaf][number] for number, leaf in enumerate(order))]
    if not fitting:
        shapes = "; ".join(f"A {list(pair.A.shape)}, B {list(pair.B.shape)}" for pair in pairs)
        wanted = ", ".join(f"{leaf} {list(place.shape)}" for leaf, place in places.items())
        raise LoraLabError(f"{owner!r} has {shapes} in the file, which fit no order of {wanted} in the base: another model, or a wrong rank")
    usual = [order for order in fitting if list(order) == [leaf for leaf in PROJECTIONS if leaf in order]]
    if len(fitting) > 1 and not usual:
        raise LoraLabError(f"{owner!r}: the file does not say which pair is for which of {', '.join(places)}, and the shapes fit several ways: "
                           "merge in memory, with the model")  # fmt: skip
    return dict(zip((usual if len(fitting) > 1 else fitting)[0], pairs, strict=True))


def _fits(path: str, pair: Pair, place: _Place, adapter: AdapterFile) -> bool:
    rank, (n, sizes) = adapter.settings.rank_of(path), (1, place.shape) if len(place.shape) == 2 else (place.shape[0], place.shape[1:])
    if len(place.shape) not in (2, 3) or len(pair.A.shape) != 2 or len(pair.B.shape) != 2:
        return False
    (rows, fan_in), (out, columns) = pair.A.shape, pair.B.shape
    turned = place.whole and len(place.shape) == 3 and tuple(sizes) == (fan_in, out)
    return rows == columns == n * rank and (tuple(sizes) == (out, fan_in) or turned)


def _is_transposed(path: str, pair: Pair, place: _Place, described: dict[str, Any], config: dict[str, Any]) -> bool:
    """Whether the stack is [n, in, out]; of square ones the shapes do not tell."""
    straight, across = (pair.B.shape[0], pair.A.shape[1]), (pair.A.shape[1], pair.B.shape[0])
    if straight != across:
        return place.shape[1:] == across
    if isinstance(described.get("transposed"), bool):
        return bool(described["transposed"])
    types = {config.get("model_type"), (config.get("text_config") or {}).get("model_type")}
    if types & {*TRANSPOSED, *STRAIGHT}:
        return bool(types & set(TRANSPOSED))
    raise LoraLabError(f"{path!r} {list(place.shape)} is a stack of square matrices, [in, out] or [out, in]: neither the file nor the base's "
                       f"model_type={config.get('model_type')!r} says which; merge in memory, with the model")  # fmt: skip

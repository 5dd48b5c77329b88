"""LoRA for parts of a fused layer, say for q and v of one matrix that holds q, k and v: a pair of its own for each part.

    lora_A [n r, in]   A of each part, one below the other        B placed   q  [ B_q   .  ]
    lora_B [rows, r]   B of each part, only the rows it has       [out, n r] k  [  .    .  ]   the dots are zeros
                                                                             v  [  .   B_v ]

The update is ``scaling * placed(B) A x``: to merging, to several adapters at once and in files it is a plain pair of rank n r. loralib's
MergedLinear(enable_lora=[True, False, True]) and litgpt's lora_query, lora_key and lora_value compute the same. layouts.py knows whose
rows are whose.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..delta import weight_norm
from ..errors import LoraLabError
from ..kinds import LinearKind
from ..variants import DoRA, Variant, variant_of
from ..wrapping import whole

if TYPE_CHECKING:
    from ..layers import LoRA

Runs = tuple[tuple[int, int], ...]  # (start, stop) of rows that lie together


@dataclass(frozen=True)
class Layout:
    """Which outputs of a fused layer are whose. They come as `blocks` blocks of `block_rows`, alike: one, or one for each head.

    parts: (name, runs) with the rows (start, stop) that a part has in each block.

    >>> heads = interleaved(2, {"q": 3, "k": 3, "v": 3})
    >>> heads.parts
    (('q', ((0, 3),)), ('k', ((3, 6),)), ('v', ((6, 9),)))
    >>> heads.only(["q", "v"]).own(torch.arange(18)).tolist()
    [0, 1, 2, 9, 10, 11, 6, 7, 8, 15, 16, 17]
    """

    blocks: int
    block_rows: int
    parts: tuple[tuple[str, Runs], ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.parts)

    @property
    def out(self) -> int:
        """Outputs of the whole layer."""
        return self.blocks * self.block_rows

    @property
    def sizes(self) -> list[int]:
        """Outputs of each part."""
        return [self.blocks * sum(stop - start for start, stop in runs) for _, runs in self.parts]

    def only(self, names: Sequence[str]) -> Layout:
        """The layout of these parts, in their order in the layer."""
        return Layout(self.blocks, self.block_rows, tuple(part for part in self.parts if part[0] in names))

    def own(self, rows: Tensor) -> Tensor:
        """The parts' own of [out, ...]: [sum of sizes, ...], part after part."""
        inside = rows.unflatten(0, (self.blocks, self.block_rows))
        pieces = [torch.cat([inside[:, start:stop] for start, stop in runs], 1).flatten(0, 1) for _, runs in self.parts]
        return torch.cat(pieces)

    def spread(self, own: Tensor) -> Tensor:
        """The opposite of `own`: [sum of sizes] -> [out], zeros where no part is."""
        placed: Tensor = self.place(own[:, None]).sum(1)
        return placed

    def place(self, B: Tensor) -> Tensor:
        """B [sum of sizes, r] -> [out, n r]: the rows of part number p go to the layer's rows they are for, into columns p r to (p + 1) r."""
        rank = B.shape[1]
        placed = B.new_zeros(self.blocks, self.block_rows, len(self.parts), rank)
        for p, ((_, runs), piece) in enumerate(zip(self.parts, B.split(self.sizes), strict=True)):
            piece, done = piece.view(self.blocks, -1, rank), 0
            for start, stop in runs:
                placed[:, start:stop, p] = piece[:, done : done + stop - start]
                done += stop - start
        return placed.view(self.out, len(self.parts) * rank)

    def take(self, placed: Tensor) -> Tensor:
        """The opposite of `place`. Raises LoraLabError where something stands between the blocks."""
        columns = placed.chunk(len(self.parts), dim=1)
        B = torch.cat([self.only([name]).own(piece) for name, piece in zip(self.names, columns, strict=True)])
        if not torch.equal(self.place(B), placed):
            raise LoraLabError(f"B {list(placed.shape)} is not zero outside the blocks of {', '.join(self.names)}")
        return B


def consecutive(sizes: Mapping[str, int]) -> Layout:
    """Parts one after the other: {"q": 64, "k": 16, "v": 16} of a layer with 96 outputs."""
    return interleaved(1, sizes)


def interleaved(blocks: int, sizes: Mapping[str, int]) -> Layout:
    """The same again for each block: of 2 heads with {"q": 64, "k": 64, "v": 64} the outputs are q k v q k v."""
    parts, start = [], 0
    for name, size in sizes.items():
        parts.append((name, ((start, start + size),)))
        start += size
    return Layout(blocks, start, tuple(parts))


def scattered(out: int, rows: Mapping[str, Sequence[int]]) -> Layout:
    """Parts by the numbers of their outputs (in the order they have in the layer), as the largest number of blocks that are alike.

    >>> scattered(6, {"even": [0, 2, 4], "odd": [1, 3, 5]}) == interleaved(3, {"even": 1, "odd": 1})
    True
    """
    owner = torch.full((out,), -1)
    for number, numbers in enumerate(rows.values()):
        owner[torch.tensor(list(numbers))] = number
    sizes = (size for size in range(1, out + 1) if out % size == 0)
    block = next(owner[:size] for size in sizes if torch.equal(owner, owner[:size].repeat(out // size)))
    return Layout(out // len(block), len(block), tuple((name, _runs((block == number).tolist())) for number, name in enumerate(rows)))


def _runs(mine: list[bool]) -> Runs:
    edges = [i for i, (before, now) in enumerate(zip([False, *mine], [*mine, False], strict=True)) if before != now]
    return tuple(zip(edges[::2], edges[1::2], strict=True))


# The variants -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fused(Variant):
    """LoRA for some parts of a fused layer, each with A [r, in] and B [its outputs, r]: what it would be with a layer for each part."""

    layout: Layout = Layout(1, 0, ())

    def shapes(self, kind: LinearKind, module: nn.Module, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (len(self.layout.parts) * rank, kind.shape(module)[0]), (sum(self.layout.sizes), rank)

    def rank(self, layer: LoRA, adapter: str) -> int:
        return layer.lora_B[adapter].shape[1]

    def pieces(self, A: Tensor, B: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        yield from zip(A.chunk(len(self.layout.parts)), B.split(self.layout.sizes), strict=True)

    def pair(self, layer: LoRA, adapter: str) -> tuple[Tensor, Tensor]:
        """A of all parts, B placed: of rank n r."""
        return layer.lora_A[adapter], self.layout.place(layer.lora_B[adapter])

    def pair_for_file(self, layer: LoRA, adapter: str) -> tuple[Tensor, Tensor]:
        """Of tensors that fully_shard divided, the whole: their rows are to be placed."""
        return whole(layer.lora_A[adapter].detach()), self.layout.place(whole(layer.lora_B[adapter].detach()))


@dataclass(frozen=True)
class FusedDoRA(Fused, DoRA):
    """DoRA for some parts of a fused layer: the magnitude is of their outputs, the others keep the norm they have."""

    def extras(self, kind: LinearKind, module: nn.Module, A: Tensor, B: Tensor, scaling: float) -> dict[str, nn.Parameter]:
        whole = DoRA.extras(self, kind, module, A, self.layout.place(B), scaling)
        return {name: nn.Parameter(self.layout.own(vector.detach())) for name, vector in whole.items()}

    def magnitude(self, layer: LoRA, adapter: str, norm: Tensor, rows: slice = slice(None)) -> Tensor:
        return self._filled_up(layer.lora_magnitude_vector[adapter], norm, rows)

    def magnitude_for_file(self, layer: LoRA, adapter: str) -> Tensor:
        weight, (A, B) = whole(layer.lora_kind.matrix(layer)), self.pair_for_file(layer, adapter)
        norm = weight_norm(weight, A, B, layer.lora_scaling[adapter]).to(A.dtype)
        return self._filled_up(whole(layer.lora_magnitude_vector[adapter].detach()), norm, slice(None))

    def _filled_up(self, m: Tensor, norm: Tensor, rows: slice) -> Tensor:
        own = self.layout.spread(torch.ones_like(m))[rows] > 0
        return torch.where(own, self.layout.spread(m)[rows], norm)


def variant_for(name: str, init: str, freeze_A: bool, parts: Layout | None) -> Variant:
    """The variant a request means for one layer, some parts of it or all."""
    if parts is None:
        return variant_of(name, init, freeze_A)
    return (FusedDoRA if name == "dora" else Fused)(freeze_A, parts)


def parts_in(layer: Any, adapter: str) -> Layout | None:
    """The parts of a layer that an adapter is for; None where it is for the whole."""
    variant = layer.lora_variant[adapter]
    return variant.layout if isinstance(variant, Fused) else None

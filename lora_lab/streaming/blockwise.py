"""The arithmetic of a merge on rows of a stored tensor: ``W + scaling * B @ A`` in float32, rounded once.

A Linear's weight is stored [out, in], so a block of its rows takes rows of B; Conv1D's and an embedding's are stored [in, out]:
there the update is ``scaling * A^T @ B^T``, and a block takes columns of A. DoRA's norms are over one output's weights: within a
block in the first case, over all blocks, in a pass of their own, in the second.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import LoraLabError
from ..peft_files.folder import Pair, Rows
from .shards import StoredTensor


@dataclass(frozen=True)
class MergedTensor:
    """One tensor the merge changed: Frobenius norms before and of the change, and the largest error of the one rounding."""

    name: str
    weight_norm: float
    delta_norm: float
    rounding_error: float


@dataclass(frozen=True)
class Change:
    """What becomes of one tensor: read from `source` (None: from the base), then some rows from `rows`, then ``+ scaling * left @ right``,
    ``* magnitude / norm``.

    transposed: the weight is stored [in, out].  bias: a vector to add, times scaling.  stack: the number of matrices in one tensor, 0 for a layer's.
    """

    source: StoredTensor | None = None
    pair: Pair | None = None
    bias: StoredTensor | None = None
    scaling: float = 1.0
    transposed: bool = False
    rows: Rows | None = None
    stack: int = 0

    @property
    def computed(self) -> bool:
        """Not only replaced."""
        return self.pair is not None or self.bias is not None or self.rows is not None


def merged_blocks(base: StoredTensor, change: Change, out: torch.dtype, name: str, merged: list[MergedTensor]) -> Iterator[Tensor]:
    """The rows of a merged tensor in `out`, block by block; when the last is drawn, a line is added to `merged`."""
    source = change.source or base
    wide = working_dtype(source, change, out)
    factor = dora_factor(source, change, wide)
    squares, change_squares, error = 0.0, 0.0, 0.0
    for (_, old), (start, rows) in zip(base.blocks(), updated_blocks(source, change, wide), strict=True):
        exact = rows if factor is None else scale(rows, factor, start, change.transposed)
        rounded = exact.to(out)
        if not torch.isfinite(rounded).all():
            raise LoraLabError(f"{name!r} would hold NaN or infinity in {out}: use dtype=torch.float32 (or is the base itself not finite?)")
        before = old.to(wide)
        squares += _square_sum(before)
        change_squares += _square_sum(exact - before)
        error = max(error, float((rounded.to(wide) - exact).abs().max())) if exact.numel() else error
        yield rounded
    merged.append(MergedTensor(name, squares**0.5, change_squares**0.5, error))


def updated_blocks(source: StoredTensor, change: Change, wide: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """(first row, ``W + scaling * B @ A`` rows) in the wide dtype; every block is a copy of its own."""
    left, right = low_rank(change, wide)
    bias = None if change.bias is None else change.scaling * change.bias.read().to(wide)
    for start, rows in source.blocks():
        part = slice(start, start + (rows.shape[0] if rows.ndim else 1))
        total = with_rows(rows.to(wide, copy=True), start, change.rows)
        if left is not None and right is not None:
            if change.stack:
                total.baddbmm_(left[part], right[part], alpha=change.scaling)
            else:
                total.flatten(1).addmm_(left[part], right, alpha=change.scaling)
        yield start, total if bias is None else total + bias[part]


def with_rows(block: Tensor, start: int, rows: Rows | None) -> Tensor:
    """The block, whose first row is row `start` of the tensor, with the trained rows that lie in it."""
    here = [place for place, word in enumerate(rows.words) if start <= word < start + len(block)] if rows is not None else []
    if rows is not None and here:
        block[[rows.words[place] - start for place in here]] = rows.tensor.read()[here].to(block)
    return block


def low_rank(change: Change, wide: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """(left [rows, r], right [r, columns]) of the stored weight: B and A, or A^T and B^T where it is stored transposed."""
    if change.pair is None:
        return None, None
    A, B = (tensor.read().to(wide).flatten(1) for tensor in (change.pair.A, change.pair.B))
    if change.stack:  # of each matrix: see peft_files/parameters.py
        A, B = A.unflatten(0, (change.stack, -1)), B.unflatten(1, (-1, change.stack)).permute(2, 0, 1)
        return (A.mT, B.mT) if change.transposed else (B, A)
    return (A.T, B.T) if change.transposed else (B, A)


def dora_factor(source: StoredTensor, change: Change, wide: torch.dtype) -> Tensor | None:
    """magnitude / ||W + scaling B A|| for each output (Liu et al. 2024, equation 5): a first pass over the tensor."""
    if change.pair is None or change.pair.magnitude is None:
        return None
    blocks = (rows.flatten(1).double().square() for _, rows in updated_blocks(source, change, wide))
    squares = sum(block.sum(0) for block in blocks) if change.transposed else torch.cat([block.sum(1) for block in blocks])
    assert isinstance(squares, Tensor)
    factor = change.pair.magnitude.read().flatten().double() / squares.sqrt()
    return torch.where(squares > 0, factor, 0.0).to(wide)  # a row of zeros has no direction, and stays what it is


def scale(rows: Tensor, factor: Tensor, start: int, transposed: bool) -> Tensor:
    """Each output times its factor: columns where the weight is stored [in, out], else rows."""
    return rows * factor if transposed else rows * factor[start : start + len(rows)].reshape(-1, *[1] * (rows.ndim - 1))


def _square_sum(block: Tensor) -> float:
    return float(torch.linalg.vector_norm(block, dtype=torch.float64)) ** 2


def working_dtype(source: StoredTensor, change: Change, out: torch.dtype) -> torch.dtype:
    parts = [source, change.bias, change.rows and change.rows.tensor, *([change.pair.A, change.pair.B] if change.pair else [])]
    return torch.float64 if out == torch.float64 or any(part and part.dtype == "F64" for part in parts) else torch.float32

"""How much of a training's work is padding: the same rows in batches at random, in length buckets, and packed.

>>> rows = [{"input_ids": [1] * length} for length in (40, 12, 9, 3, 22, 11, 3, 9, 5, 4, 6, 7)]
>>> print(padding_report(rows, micro_batch_size=3))
12 rows, 131 tokens    computed   padding   largest batch   attention pairs
unsorted                    246    46.7 %             120             6,858
length buckets              186    29.6 %             120             5,358
packed                      131     0.0 %              58             2,655
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import LoraLabError
from .batching import length_buckets, padding_share
from .formats import Row
from .packing import packs, random_batches
from .templates import encode_rows

Plan = list[list[int]]


@dataclass(frozen=True)
class BatchCost:
    """What one pass over the rows computes.

    positions: padding counted.  padding_share: the part of them that is padding, 0 to 1.  largest_batch: positions of the largest micro-batch,
    which memory follows.  attention_pairs: positions times those each is compared with, a layer and a head; causality halves it.
    """

    positions: int
    padding_share: float
    largest_batch: int
    attention_pairs: int


@dataclass(frozen=True)
class PaddingReport:
    """rows, tokens: of the data.  costs: by "unsorted", "length buckets" and "packed"; printed, a table."""

    rows: int
    tokens: int
    costs: dict[str, BatchCost]

    def __getitem__(self, name: str) -> BatchCost:
        return self.costs[name]

    def __str__(self) -> str:
        head = f"{self.rows:,} rows, {self.tokens:,} tokens"
        width = max(len(head), *map(len, self.costs))
        lines = [f"{head:<{width}}  {'computed':>10}   padding   largest batch   attention pairs"]
        for name, cost in self.costs.items():
            lines.append(f"{name:<{width}}  {cost.positions:>10,}   {100 * cost.padding_share:5.1f} %  {cost.largest_batch:>14,}"
                         f"   {cost.attention_pairs:>15,}")  # fmt: skip
        return "\n".join(lines)

    def sentence(self, packing: bool, packable: bool = True) -> str:
        """One line for a run that begins. packing: whether it packs.  packable: whether it could."""
        unsorted, buckets, packed = (self.costs[name] for name in ("unsorted", "length buckets", "packed"))
        if packing:
            return f"padding: none, packed (in length buckets {_percent(buckets)} of the positions would be, unsorted {_percent(unsorted)})"
        other = f"; packed none, and at most {packed.largest_batch:,} instead of {buckets.largest_batch:,} positions at once" if packable else ""
        return f"padding: {_percent(buckets)} of the positions, in length buckets (unsorted {_percent(unsorted)}{other})"


def padding_report(rows: Sequence[Row], micro_batch_size: int = 8, *, max_tokens: int | None = None, tokenizer: Any = None,
                   seed: int = 0) -> PaddingReport:  # fmt: skip
    """Compare the ways to make batches of `rows`: encoded ones, or text rows with a tokenizer. Of an encoder-decoder: what it reads.

    micro_batch_size, max_tokens, seed: as in TrainConfig; the first epoch's batches are those of the run.
    Raises LoraLabError for no rows, for one longer than max_tokens, and for a micro_batch_size below 1.
    """
    if micro_batch_size < 1:
        raise LoraLabError(f"micro_batch_size={micro_batch_size!r}: expected a whole number of at least 1")
    lengths = _lengths(rows, tokenizer)
    shuffled = random_batches(len(lengths), micro_batch_size, _generator(seed))
    packed = shuffled if max_tokens is None else packs(lengths, max_tokens, _generator(seed))
    buckets = length_buckets(lengths, micro_batch_size, _generator(seed))
    costs = {"unsorted": _padded(shuffled, lengths), "length buckets": _padded(buckets, lengths), "packed": _packed(packed, lengths)}
    return PaddingReport(len(lengths), sum(lengths), costs)


def _generator(seed: int) -> random.Random:
    return random.Random(f"{seed}-0")  # the training loop's, of its first epoch


def _lengths(rows: Sequence[Row], tokenizer: Any) -> list[int]:
    encoded = rows if all("input_ids" in row and "attention_mask" not in row for row in rows) else encode_rows(rows, tokenizer)
    if not len(encoded):
        raise LoraLabError("the data holds no rows: there is nothing to make batches of")
    return [len(row["input_ids"]) for row in encoded]


def _padded(batches: Plan, lengths: Sequence[int]) -> BatchCost:
    shapes = [(len(batch), max(lengths[i] for i in batch)) for batch in batches]
    return BatchCost(sum(size * width for size, width in shapes), padding_share(batches, lengths), max(size * width for size, width in shapes),
                     sum(size * width**2 for size, width in shapes))  # fmt: skip


def _packed(batches: Plan, lengths: Sequence[int]) -> BatchCost:
    tokens = [sum(lengths[i] for i in batch) for batch in batches]
    return BatchCost(sum(tokens), 0.0, max(tokens), sum(length**2 for length in lengths))


def _percent(cost: BatchCost) -> str:
    return f"{100 * cost.padding_share:.1f} %"

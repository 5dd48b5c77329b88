"""Examples to batches: rows of like length together, so that little is computed for padding."""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .templates import IGNORE, Example

Batch = dict[str, Any]  # tensors by the names of the model's arguments; packed, document_lengths, too
POOL = 16  # micro-batches that are sorted together: enough for like lengths, few enough to stay random


def length_buckets(lengths: Sequence[int], size: int, generator: random.Random | None = None) -> list[list[int]]:
    """Indices in batches of `size`, like lengths together; shuffled by `generator`, or in order of length without one.

    >>> length_buckets([3, 9, 2, 8], size=2)
    [[2, 0], [3, 1]]
    """
    if generator is None:
        by_length = sorted(range(len(lengths)), key=lambda index: lengths[index])
        return [by_length[i : i + size] for i in range(0, len(lengths), size)]
    order = array("q", range(len(lengths)))  # a quarter of a list's memory
    generator.shuffle(order)
    batches = []
    for start in range(0, len(order), size * POOL):
        pool = sorted(order[start : start + size * POOL], key=lambda index: lengths[index])
        batches += [pool[i : i + size] for i in range(0, len(pool), size)]
    generator.shuffle(batches)
    return batches


def collate(examples: Sequence[Example], pad_id: int, device: Any = None) -> Batch:
    """input_ids, attention_mask and labels, [B, T] each, padded on the right with pad_id, 0 and -100; an encoder-decoder's labels to their own T."""
    return {**_texts(examples, pad_id, device), "labels": _padded([e["labels"] for e in examples], IGNORE, device)}


def collate_classes(examples: Sequence[dict[str, Any]], pad_id: int, device: Any = None) -> Batch:
    """Of texts with a label: input_ids and attention_mask [B, T], token_type_ids where an example has them, labels [B] or [B, classes]."""
    batch = {**_texts(examples, pad_id, device), "labels": torch.tensor([e["label"] for e in examples], device=device)}
    if any("token_type_ids" in e for e in examples):
        batch["token_type_ids"] = _padded([e.get("token_type_ids", [0] * len(e["input_ids"])) for e in examples], 0, device)
    return batch


def _texts(examples: Sequence[Any], pad_id: int, device: Any) -> Batch:
    rows = [e["input_ids"] for e in examples]
    return {"input_ids": _padded(rows, pad_id, device), "attention_mask": _padded([[1] * len(row) for row in rows], 0, device)}


def _padded(rows: Sequence[list[int]], fill: int, device: Any) -> Tensor:
    """[B, T], each row filled up on the right to the longest."""
    width = max(map(len, rows))
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows], device=device)


def padding_share(batches: Sequence[Sequence[int]], lengths: Sequence[int]) -> float:
    """The part of all computed positions that is padding, 0 to 1."""
    computed = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    return 1.0 - sum(lengths[i] for batch in batches for i in batch) / max(computed, 1)

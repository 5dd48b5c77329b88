"""Which rows make each micro-batch, and how many steps that gives: the same for every process, and for a run that is resumed."""

from __future__ import annotations

import itertools
import math
import random
from array import array
from collections.abc import Iterator, Sequence
from typing import Any

from ..data.batching import length_buckets
from ..data.packing import packs, random_batches
from .config import TrainConfig

Examples = Sequence[Any]


def step_batches(examples: Examples, config: TrainConfig, processes: int = 1) -> Iterator[list[list[int]]]:
    """Endlessly, epoch after epoch: the micro-batches (row indices) of each optimizer step, those of all processes."""
    lengths, at_once = lengths_of(examples), config.grad_accum_steps * processes
    for epoch in itertools.count():
        batches = epoch_batches(lengths, config, epoch)
        for start in range(0, len(batches), at_once):
            yield batches[start : start + at_once]


def lengths_of(examples: Examples) -> Sequence[int]:
    """Tokens of each; eight bytes for one, as there may be millions."""
    return array("q", (len(example["input_ids"]) for example in examples))


def epoch_batches(lengths: Sequence[int], config: TrainConfig, epoch: int) -> list[list[int]]:
    """The micro-batches of one epoch: like lengths together where there is padding, at random where rows are packed."""
    generator = random.Random(f"{config.seed}-{epoch}")
    if not config.packing:
        return length_buckets(lengths, config.micro_batch_size, generator)
    if config.max_tokens is None:
        return random_batches(len(lengths), config.micro_batch_size, generator)
    return packs(lengths, config.max_tokens, generator)


def count_steps(examples: Examples, config: TrainConfig, processes: int = 1) -> int:
    """Optimizer steps in `epochs` passes over the data, of which under max_tokens each may have another number."""
    at_once = config.grad_accum_steps * processes
    if config.max_tokens is None:
        per_epoch = math.ceil(math.ceil(len(examples) / config.micro_batch_size) / at_once)
        return max(1, math.ceil(round(per_epoch * config.epochs, 6)))  # 1.1 epochs of 100 steps are 110, not 111
    lengths, whole = lengths_of(examples), int(config.epochs)
    steps = [math.ceil(len(epoch_batches(lengths, config, epoch)) / at_once) for epoch in range(whole + 1)]
    return max(1, sum(steps[:whole]) + math.ceil(round(steps[whole] * (config.epochs - whole), 6)))

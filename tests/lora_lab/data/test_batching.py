"""Buckets of like lengths, and rows padded to batches."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_lab import data

LENGTHS = random.Random(3).choices(range(5, 200), k=500)


def shuffled(lengths, size, seed):
    return data.length_buckets(lengths, size, random.Random(seed))


@given(st.lists(st.integers(1, 50), min_size=1, max_size=300), st.integers(1, 9), st.none() | st.integers(0, 5))
def test_every_row_is_in_exactly_one_batch(lengths, size, seed):
    batches = data.length_buckets(lengths, size, None if seed is None else random.Random(seed))
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    assert len(batches) == -(-len(lengths) // size)
    assert sorted(map(len, batches))[1:] == [size] * (len(batches) - 1)  # one may be short


def test_the_same_seed_gives_the_same_batches_and_another_gives_others():
    assert shuffled(LENGTHS, 8, seed=1) == shuffled(LENGTHS, 8, seed=1)
    assert shuffled(LENGTHS, 8, seed=1) != shuffled(LENGTHS, 8, seed=2)


def test_buckets_pad_far_less_than_random_batches():
    order = random.Random(0).sample(range(len(LENGTHS)), len(LENGTHS))
    at_random = [order[i : i + 8] for i in range(0, len(order), 8)]
    by_length = data.padding_share(data.length_buckets(LENGTHS, 8), LENGTHS)
    assert 0 < by_length < data.padding_share(shuffled(LENGTHS, 8, seed=0), LENGTHS) < 0.3 * data.padding_share(at_random, LENGTHS)


def test_buckets_stay_random():
    """Batches are not in order of length, and a row meets other rows in the next epoch."""
    first, second = shuffled(LENGTHS, 8, seed=0), shuffled(LENGTHS, 8, seed=1)
    longest = [max(LENGTHS[i] for i in batch) for batch in first]
    assert longest[:16] != sorted(longest[:16]) and longest[:16] != sorted(longest[:16], reverse=True)
    assert {frozenset(batch) for batch in first}.isdisjoint({frozenset(batch) for batch in second})


def test_the_padding_share_is_padding_over_computed_positions():
    assert data.padding_share([[0, 1], [2]], [3, 5, 4]) == pytest.approx(2 / 14)
    assert data.padding_share([[0], [1]], [3, 5]) == 0.0
    assert data.padding_share([], []) in (0.0, 1.0)


def test_collate_pads_on_the_right_with_the_three_fills():
    batch = data.collate([{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8], "labels": [8]}], pad_id=9)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[5, 6, 7], [8, 9, 9]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
        "labels": [[-100, 6, 7], [8, -100, -100]],
    }
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_collate_changes_no_row():
    rows = [{"input_ids": [5], "labels": [5]}, {"input_ids": [6, 7], "labels": [6, 7]}]
    data.collate(rows, pad_id=0)
    assert rows == [{"input_ids": [5], "labels": [5]}, {"input_ids": [6, 7], "labels": [6, 7]}]


def test_collate_puts_the_batch_on_the_device():
    batch = data.collate([{"input_ids": [5], "labels": [5]}], pad_id=0, device="meta")
    assert {tensor.device.type for tensor in batch.values()} == {"meta"}

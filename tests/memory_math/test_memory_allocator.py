"""The caching allocator's rules, on requests whose answer is known (c10/core/AllocatorConfig.h)."""

from __future__ import annotations

import random

import pytest

from memory_math.allocator import MIB, CachingAllocator
from memory_math.tape import Storage


@pytest.mark.parametrize(("nbytes", "reserved"), [
    (1, 2 * MIB), (MIB, 2 * MIB), (MIB + 1, 20 * MIB), (10 * MIB - 512, 20 * MIB), (10 * MIB, 10 * MIB), (11 * MIB, 12 * MIB),
    (33 * MIB, 34 * MIB),
])  # fmt: skip
def test_one_request_reserves_its_segment(nbytes: int, reserved: int) -> None:
    allocator = CachingAllocator()
    storage = Storage(allocator, nbytes, "weights")
    assert allocator.peak_reserved == reserved
    del storage


def test_small_requests_share_a_segment_and_freed_neighbours_join_again() -> None:
    allocator = CachingAllocator()
    pieces = [Storage(allocator, MIB // 2, "weights") for _ in range(4)]
    assert allocator.peak_reserved == 2 * MIB
    pieces.clear()
    again = [Storage(allocator, MIB, "weights") for _ in range(2)]
    assert allocator.peak_reserved == 2 * MIB
    del again


def test_a_hole_that_is_too_small_costs_a_new_segment() -> None:
    allocator = CachingAllocator()
    a, b, c = (Storage(allocator, 6 * MIB, "weights") for _ in range(3))  # 18 of 20 MiB
    del b
    d = Storage(allocator, 8 * MIB, "weights")
    assert allocator.peak_reserved == 40 * MIB
    e = Storage(allocator, 5 * MIB, "weights")  # into the hole that b left
    assert allocator.peak_reserved == 40 * MIB
    del a, c, d, e


def test_reserved_never_falls_below_what_is_alive_and_everything_comes_back() -> None:
    generator, allocator = random.Random(0), CachingAllocator()
    alive: list[Storage] = []
    for _ in range(2000):
        if alive and generator.random() < 0.5:
            alive.pop(generator.randrange(len(alive)))
        else:
            alive.append(Storage(allocator, generator.choice((100, 5000, MIB, 3 * MIB, 15 * MIB)), "workspace"))
        assert allocator.total == sum(storage.nbytes for storage in alive) <= allocator.peak_reserved
    alive.clear()
    assert allocator.total == 0
    free = sum(size for blocks in allocator._free.values() for size, _, _ in blocks)
    assert free == allocator.peak_reserved

"""PyTorch's CUDA caching allocator, played with the sizes of a step: how much it reserves for what is allocated.

Rules, from c10/core/AllocatorConfig.h and c10/cuda/CUDACachingAllocator.cpp of PyTorch 2.13 with default settings: sizes are rounded up
to 512 B; requests up to 1 MiB come out of 2 MiB segments, those below 10 MiB out of 20 MiB segments, larger ones get a segment of their own
rounded up to 2 MiB; the smallest free block that is large enough is taken, and split if what would be left is worth it; neighbours
that are both free become one again; segments are kept. What another stream or another library does is not in it.
"""

from __future__ import annotations

from bisect import bisect_left, insort

from .tape import Ledger

MIB = 2**20
ROUND_BYTES, SMALL_BYTES, LARGE_BYTES = 512, MIB, 10 * MIB


class Block:
    """A stretch of one segment, with its neighbours in it. Of blocks of one size the lowest address is taken."""

    __slots__ = ("address", "after", "before", "free", "size", "small")

    def __init__(self, address: int, size: int, small: bool) -> None:
        self.address, self.size, self.small, self.free = address, size, small, False
        self.before: Block | None = None
        self.after: Block | None = None


class CachingAllocator(Ledger):
    """A ledger that also places every storage. peak_reserved: bytes of all segments, which only grow."""

    def __init__(self) -> None:
        super().__init__()
        self.peak_reserved = 0
        self._free: dict[bool, list[tuple[int, int, Block]]] = {True: [], False: []}

    def place(self, nbytes: int) -> Block:
        """Find room for a storage."""
        size = max(ROUND_BYTES, -(-nbytes // ROUND_BYTES) * ROUND_BYTES)
        small = size <= SMALL_BYTES
        block = self._best_fit(size, small) or self._segment(size, small)
        left = block.size - size
        if left >= ROUND_BYTES if small else left > SMALL_BYTES:
            self._split(block, size)
        block.free = False
        return block

    def release(self, block: Block) -> None:
        """Give a block back and join it with free neighbours."""
        for neighbour in (block.before, block.after):
            if neighbour is not None and neighbour.free:
                self._take(neighbour)
                self._join(block, neighbour)
        block.free = True
        insort(self._free[block.small], (block.size, block.address, block))

    def _best_fit(self, size: int, small: bool) -> Block | None:
        free = self._free[small]
        at = bisect_left(free, (size, 0))
        return free.pop(at)[2] if at < len(free) else None

    def _segment(self, size: int, small: bool) -> Block:
        reserve = 2 * MIB if small else 20 * MIB if size < LARGE_BYTES else -(-size // (2 * MIB)) * 2 * MIB
        block = Block(self.peak_reserved, reserve, small)
        self.peak_reserved += reserve
        return block

    def _split(self, block: Block, size: int) -> None:
        rest = Block(block.address + size, block.size - size, block.small)
        rest.before, rest.after, block.size = block, block.after, size
        if rest.after is not None:
            rest.after.before = rest
        block.after, rest.free = rest, True
        insort(self._free[rest.small], (rest.size, rest.address, rest))

    def _take(self, block: Block) -> None:
        free = self._free[block.small]
        free.pop(bisect_left(free, (block.size, block.address)))

    def _join(self, block: Block, neighbour: Block) -> None:
        block.size += neighbour.size
        if neighbour is block.before:
            block.address, block.before = neighbour.address, neighbour.before
            if block.before is not None:
                block.before.after = block
        else:
            block.after = neighbour.after
            if block.after is not None:
                block.after.before = block

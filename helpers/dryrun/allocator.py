"""What PyTorch's CUDA allocator makes of a sequence of allocations: how much it reserves, and where it runs out.

    replay([("weights", 500 * MIB), ("logits", 2 * GIB), ("logits", -2 * GIB)]).peak_reserved

Tensors are not taken from the driver one by one. PyTorch asks for segments, cuts them into blocks, keeps freed blocks and merges
neighbors; what it holds (reserved) is therefore more than what tensors use (allocated), and running out depends on the former.
The rules below are those of c10/cuda/CUDACachingAllocator.cpp for one stream, as of PyTorch 2.13.
"""

from __future__ import annotations

import bisect
from collections.abc import Hashable, Iterable
from dataclasses import dataclass

KIB, MIB = 2**10, 2**20
ROUNDING = 512  # every request is rounded up to a multiple of this
SMALL_REQUEST = 1 * MIB  # requests up to this size live in the small pool
SMALL_SEGMENT = 2 * MIB  # what the small pool asks the driver for
LARGE_SEGMENT = 20 * MIB  # what the large pool asks for, for requests below ...
LARGE_REQUEST = 10 * MIB  # ... this size; a larger request gets a segment of its own, rounded up to ...
SEGMENT_ROUNDING = 2 * MIB


class OutOfMemory(RuntimeError):
    """The replay reached the card's capacity, as the real allocator would."""


@dataclass(eq=False)
class Block:
    """A piece of a segment. `before` and `after` are its neighbors in the same segment."""

    size: int
    pool: str
    number: int
    free: bool = True
    before: Block | None = None
    after: Block | None = None


class CachingAllocator:
    """Follows malloc and free; knows at any time what is allocated, what is reserved, and the peaks of both (bytes).

    Args:
        capacity: bytes that may be reserved; None for no limit.
        expandable: as with `PYTORCH_ALLOC_CONF=expandable_segments:True`: one segment per pool, which grows at its end.
    """

    def __init__(self, capacity: int | None = None, expandable: bool = False) -> None:
        self.capacity, self.expandable = capacity, expandable
        self.allocated = self.reserved = self.peak_allocated = self.peak_reserved = 0
        self._free: dict[str, list[tuple[int, int, Block]]] = {"small": [], "large": []}  # sorted: best fit first
        self._live: dict[Hashable, Block] = {}
        self._tail: dict[str, Block] = {}  # the last block of each expandable segment
        self._blocks = 0

    def malloc(self, name: Hashable, size: int) -> None:
        """Give `name` a block of at least `size` bytes.

        Raises:
            OutOfMemory: even after returning unused segments there is no room.
        """
        size = max(ROUNDING, _round_up(size, ROUNDING))
        pool = "small" if size <= SMALL_REQUEST else "large"
        block = self._best_fit(pool, size) or (
            self._grow(pool, size) if self.expandable else self._new_segment(pool, size)
        )
        rest = block.size - size
        if rest >= ROUNDING if pool == "small" or self.expandable else rest > SMALL_REQUEST:
            self._split(block, size)
        block.free = False
        self._live[name] = block
        self.allocated += block.size
        self.peak_allocated = max(self.peak_allocated, self.allocated)

    def free(self, name: Hashable) -> None:
        """Take the block of `name` back and merge it with free neighbors."""
        block = self._live.pop(name)
        self.allocated -= block.size
        block.free = True
        if block.before is not None and block.before.free:
            self._forget(block.before)
            block = self._merge(block.before, block)
        if block.after is not None and block.after.free:
            self._forget(block.after)
            block = self._merge(block, block.after)
        self._remember(block)

    def release_unused_segments(self) -> None:
        """What `torch.cuda.empty_cache()` does: segments that are one free block go back to the driver."""
        for blocks in self._free.values():
            for _, _, block in list(blocks):
                if block.before is None and block.after is None and not self.expandable:
                    self._forget(block)
                    self.reserved -= block.size

    def run(self, trace: Iterable[tuple[Hashable, int]]) -> CachingAllocator:
        """Follow a trace of (name, bytes): positive bytes allocate, negative ones free what has that name."""
        for name, size in trace:
            if size > 0:
                self.malloc(name, size)
            else:
                self.free(name)
        return self

    def reset_peaks(self) -> None:
        """As `torch.cuda.reset_peak_memory_stats()`: peaks are counted from here."""
        self.peak_allocated, self.peak_reserved = self.allocated, self.reserved

    # ------------------------------------------------------------------------------------------------ inside

    def _best_fit(self, pool: str, size: int) -> Block | None:
        blocks = self._free[pool]
        index = bisect.bisect_left(blocks, (size, -1))
        return blocks.pop(index)[2] if index < len(blocks) else None

    def _new_segment(self, pool: str, size: int) -> Block:
        if pool == "small":
            segment = SMALL_SEGMENT
        else:
            segment = LARGE_SEGMENT if size < LARGE_REQUEST else _round_up(size, SEGMENT_ROUNDING)
        self._reserve(segment)
        return self._block(segment, pool)

    def _grow(self, pool: str, size: int) -> Block:
        page = SMALL_SEGMENT if pool == "small" else LARGE_SEGMENT
        tail = self._tail.get(pool)
        if tail is not None and tail.free:
            more = _round_up(size - tail.size, page)
            self._reserve(more)
            self._forget(tail)
            tail.size += more
            return tail
        self._reserve(_round_up(size, page))
        block = self._block(_round_up(size, page), pool)
        block.before = tail
        if tail is not None:
            tail.after = block
        self._tail[pool] = block
        return block

    def _reserve(self, size: int) -> None:
        if self.capacity is not None and self.reserved + size > self.capacity:
            self.release_unused_segments()
            if self.reserved + size > self.capacity:
                raise OutOfMemory(
                    f"{size / MIB:.0f} MiB more than the {self.reserved / MIB:.0f} MiB already reserved do not fit "
                    f"into {self.capacity / MIB:.0f} MiB"
                )
        self.reserved += size
        self.peak_reserved = max(self.peak_reserved, self.reserved)

    def _block(self, size: int, pool: str) -> Block:
        self._blocks += 1
        return Block(size, pool, self._blocks)

    def _split(self, block: Block, size: int) -> None:
        rest = self._block(block.size - size, block.pool)
        rest.before, rest.after = block, block.after
        if block.after is not None:
            block.after.before = rest
        block.after, block.size = rest, size
        if self._tail.get(block.pool) is block:
            self._tail[block.pool] = rest
        self._remember(rest)

    def _merge(self, first: Block, second: Block) -> Block:
        first.size += second.size
        first.after = second.after
        if second.after is not None:
            second.after.before = first
        if self._tail.get(first.pool) is second:
            self._tail[first.pool] = first
        first.free = True
        return first

    def _remember(self, block: Block) -> None:
        bisect.insort(self._free[block.pool], (block.size, block.number, block))

    def _forget(self, block: Block) -> None:
        blocks = self._free[block.pool]
        del blocks[bisect.bisect_left(blocks, (block.size, block.number))]


def _round_up(size: int, step: int) -> int:
    return -(-size // step) * step


def replay(
    trace: Iterable[tuple[Hashable, int]], capacity: int | None = None, expandable: bool = False
) -> CachingAllocator:
    """Run a trace of (name, bytes) through a fresh allocator."""
    return CachingAllocator(capacity, expandable).run(trace)

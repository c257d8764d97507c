"""What PyTorch's CUDA allocator makes of a sequence of allocations: how much of the card it reserves.

    simulate([("weights", 500 * MIB), ("logits", 2 * GIB), ("logits", -1)]).peak_reserved

Tensors are not taken from the driver one by one. PyTorch asks for segments, cuts them into blocks, keeps freed blocks and merges
neighbors; what it holds (reserved) is therefore more than what tensors use (allocated), and running out depends on the former.
The rules below are those of c10/cuda/CUDACachingAllocator.cpp for one stream, as of PyTorch 2.13.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Hashable, Iterable

MIB = 2**20
ROUNDING = 512  # every request is rounded up to a multiple of this
SMALL_REQUEST = 1 * MIB  # requests up to this size live in the small pool
SMALL_SEGMENT = 2 * MIB  # what the small pool asks the driver for
LARGE_SEGMENT = 20 * MIB  # what the large pool asks for, for requests below ...
LARGE_REQUEST = 10 * MIB  # ... this size; a larger request gets a segment of its own, rounded up to ...
SEGMENT_ROUNDING = 2 * MIB

Event = tuple[Hashable, int]  # (name, bytes): positive bytes allocate, negative ones free what has that name
_numbers = itertools.count()


class Block:
    """A piece of a segment. The pieces of a segment form a ring, which an empty block that is never free closes."""

    def __init__(self, size: int, pool: str = "", before: Block | None = None) -> None:
        self.size, self.pool, self.free, self.number = size, pool, False, next(_numbers)
        self.before: Block = before or self
        self.after: Block = before.after if before else self
        self.before.after = self.after.before = self

    def absorb(self, after: Block) -> None:
        """Become one with the next block."""
        self.size += after.size
        self.after = after.after
        self.after.before = self


def best_fit(block: Block) -> tuple[int, int]:
    """The order in which free blocks are tried: the smallest first, among equals the oldest."""
    return block.size, block.number


class CachingAllocator:
    """Follows allocations; knows at any time what is allocated, what is reserved, and the peaks of both (bytes).

    Args:
        expandable: as with `PYTORCH_ALLOC_CONF=expandable_segments:True`: one segment per pool, which grows at its end.
    """

    def __init__(self, expandable: bool = False) -> None:
        self.expandable = expandable
        self.allocated = self.reserved = self.peak_allocated = self.peak_reserved = 0
        self._free: dict[str, list[Block]] = {"small": [], "large": []}  # each sorted by `best_fit`
        self._ends = {"small": Block(0), "large": Block(0)}  # of the segments that grow
        self._live: dict[Hashable, Block] = {}

    def run(self, trace: Iterable[Event]) -> CachingAllocator:
        """Follow the trace."""
        for name, size in trace:
            if size > 0:
                self.malloc(name, size)
            else:
                self.free(name)
        return self

    def malloc(self, name: Hashable, size: int) -> None:
        """Give `name` a block of at least `size` bytes."""
        size = round_up(size, ROUNDING)
        pool = "small" if size <= SMALL_REQUEST else "large"
        fitting = bisect.bisect_left(self._free[pool], (size, -1), key=best_fit)
        block = self._take(self._free[pool][fitting]) if fitting < len(self._free[pool]) else self._grow(pool, size)
        rest = block.size - size
        if rest >= ROUNDING if pool == "small" or self.expandable else rest > SMALL_REQUEST:
            block.size = size
            self._give(Block(rest, pool, before=block))
        self._live[name] = block
        self.allocated += block.size
        self.peak_allocated = max(self.peak_allocated, self.allocated)

    def free(self, name: Hashable) -> None:
        """Take the block of `name` back."""
        block = self._live.pop(name)
        self.allocated -= block.size
        self._give(block)

    def _grow(self, pool: str, size: int) -> Block:
        """A free block of at least `size` bytes, with new memory from the driver."""
        if self.expandable:
            end = self._ends[pool]
            missing = size - end.before.size if end.before.free else size
            new = round_up(missing, SMALL_SEGMENT if pool == "small" else LARGE_SEGMENT)
        elif pool == "small":
            end, new = Block(0), SMALL_SEGMENT
        else:
            end, new = Block(0), LARGE_SEGMENT if size < LARGE_REQUEST else round_up(size, SEGMENT_ROUNDING)
        self.reserved += new
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        self._give(Block(new, pool, before=end.before))
        return self._take(end.before)

    def _give(self, block: Block) -> None:
        """Put a block among the free ones, merged with free neighbors."""
        if block.after.free:
            block.absorb(self._take(block.after))
        if block.before.free:
            before = self._take(block.before)
            before.absorb(block)
            block = before
        block.free = True
        bisect.insort(self._free[block.pool], block, key=best_fit)

    def _take(self, block: Block) -> Block:
        """Take a block from among the free ones."""
        blocks = self._free[block.pool]
        del blocks[bisect.bisect_left(blocks, best_fit(block), key=best_fit)]
        block.free = False
        return block


def round_up(size: int, step: int) -> int:
    """The next multiple of `step`."""
    return -(-size // step) * step


def simulate(trace: Iterable[Event], before: Iterable[Event] = (), expandable: bool = False) -> CachingAllocator:
    """Run a trace through a fresh allocator. Its peaks are counted after what came `before`."""
    allocator = CachingAllocator(expandable).run(before)
    allocator.peak_allocated, allocator.peak_reserved = allocator.allocated, allocator.reserved
    return allocator.run(trace)

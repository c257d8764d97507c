"""Do the micro-batches of 1,000 steps, one after the other, fit the memory that was planned for them?

    python -m benchmarks.replay "RTX 4060" Llama-3.1-8B-Instruct             # 1,000 steps, by both kinds of allocator (many minutes)
    python -m benchmarks.replay "RTX 4060" Llama-3.1-8B-Instruct --steps 40

A dry run tells what the largest micro-batch needs alone. In a run, micro-batches of many shapes follow each other, and what one leaves in
the allocator may not suit the next. So each step is cut by the plan, the allocations of its micro-batches are replayed through
`helpers.dryrun.allocator`, and it may not take more from the driver than the plan's budget: it raises what a card would raise.

A dry run of each shape would take hours. Micro-batches of one kind make the same allocations in the same order, and the bytes of each are
a sum of parts that grow with examples, tokens, both, and pairs of tokens: a few dry runs of a kind tell those of all its shapes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import patch

import numpy as np

from helpers.config import TrainConfig
from helpers.cutting import cut
from helpers.dryrun import Step, worker
from helpers.dryrun.allocator import (
    LARGE_REQUEST,
    LARGE_SEGMENT,
    SEGMENT_ROUNDING,
    SMALL_SEGMENT,
    Block,
    CachingAllocator,
    Event,
    round_up,
)
from helpers.dryrun.model import build
from helpers.dryrun.tracker import MemoryTracker
from helpers.hardware import GIB, KNOWN_GPUS
from helpers.memory import CUBLAS_WORKSPACES, CUDA_CONTEXT
from helpers.plan import HEADROOM, Plan, step_of
from helpers.planner import make_plan
from helpers.registry import CATALOG, ModelShape

LENGTHS = Path(__file__).parent / "data" / "alpaca_like_lengths.json"
CHUNK = 4096  # tokens that TRL's loss head handles at a time: another number of them, another order of allocations
SAMPLES = 7  # dry runs of one kind; the bytes of an allocation have five unknown parts
Micro = tuple[str, bool, int, int, bool]  # checkpointing, offload, examples, tokens of the longest, gradients are there


PAGE = {"small": SMALL_SEGMENT, "large": LARGE_SEGMENT}  # bytes by which a segment grows


class OutOfMemory(RuntimeError):
    """The card has no more to give."""


class FullCard(CachingAllocator):
    """PyTorch's allocator on a card that has so many bytes to give. Before it gives up, it gives back to the driver what is free.

    That is a segment that is wholly free, or, in a segment that grows, each free page: what is asked for next may take in the addresses that
    this leaves empty (`release_cached_blocks` and `try_allocate_expandable_block` in c10/cuda/CUDACachingAllocator.cpp).
    """

    def __init__(self, expandable: bool, capacity: int) -> None:
        super().__init__(expandable)
        self.capacity = capacity
        self.holes: set[Block] = set()  # addresses without memory behind them

    def _give_back(self) -> None:
        if not self.expandable:
            for block in [block for blocks in self._free.values() for block in blocks]:
                if block.before is block.after:  # it is alone in its segment
                    self.reserved -= self._take(block).size
            return
        for pool, end in self._ends.items():
            address, block, page = 0, end.after, PAGE[pool]
            while block is not end:
                size, following = block.size, block.after
                start, stop = round_up(address, page), (address + size) // page * page
                if block.free and stop > start:
                    self._empty(block, start - address, stop - start)
                address, block = address + size, following

    def _empty(self, block: Block, start: int, size: int) -> None:
        """Take the memory away from a part of a free block; what is left before and after it stays free."""
        rest = self._take(block).size - start - size
        block.size = size
        self.holes.add(block)
        self.reserved -= size
        for left, before in ((start, block.before), (rest, block)):
            if left:
                self._give(Block(left, block.pool, before=before))

    def _grow(self, pool: str, size: int) -> Block:
        if not self.expandable:
            large = LARGE_SEGMENT if size < LARGE_REQUEST else round_up(size, SEGMENT_ROUNDING)
            new = SMALL_SEGMENT if pool == "small" else large
            if self.reserved + new > self.capacity:
                self._give_back()
            self._check(new)
            return super()._grow(pool, size)
        parts, new = self._parts(pool, size)
        if self.reserved + new > self.capacity:
            self._give_back()
            parts, new = self._parts(pool, size)
        self._check(new)
        self.reserved += new
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        whole = Block(sum(part for _, part in parts), pool, before=parts[0][0].before)
        for block, part in parts:
            if block.free:
                self._take(block)
            if block is not self._ends[pool]:
                block.size -= part
                if not block.size:
                    self.holes.discard(block)
                    block.before.after, block.after.before = block.after, block.before
        self._give(whole)
        return self._take(whole)

    def _check(self, new: int) -> None:
        if self.reserved + new > self.capacity:
            raise OutOfMemory(f"{self.reserved} bytes reserved, {self.allocated} allocated, {new} more wanted")

    def _parts(self, pool: str, size: int) -> tuple[list[tuple[Block, int]], int]:
        """(neighbors with how much is taken of each, bytes of it that the driver must give)."""
        parts, new = [], 0
        for block in self._addresses(pool, size):
            part = block.size if block.free else round_up(size, PAGE[pool])
            if block in self.holes:
                part = min(part, block.size)
            parts.append((block, part))
            size, new = size - part, new + (0 if block.free else part)
        return parts, new

    def _addresses(self, pool: str, size: int) -> list[Block]:
        """The first neighbors, free or empty, that together have room for `size`; the end of the segment has room for anything."""
        end = self._ends[pool]
        block = end.after if any(hole.pool == pool for hole in self.holes) else end
        while True:
            if block is end or block in self.holes:
                run, room = [block.before] if block.before.free else [], 0
                room = sum(each.size for each in run)
                while room < size and (block is end or block.free or block in self.holes):
                    run.append(block)
                    if block is end:
                        return run
                    room, block = room + block.size, block.after
                if room >= size:
                    return run
            else:
                block = block.after


def kind_of(micro: Micro) -> tuple:
    """Micro-batches of one kind make the same allocations in the same order."""
    checkpointing, offload, examples, longest, accumulating = micro
    return checkpointing, offload, examples > 1, -(-examples * longest // CHUNK), accumulating


def parts_of(micro: Micro) -> list[int]:
    _, _, examples, longest, _ = micro
    return [1, longest, examples, examples * longest, examples * longest**2]


@dataclass
class Recorder:
    """The allocations of a plan's micro-batches. It replaces functions of libraries, so it must have a process of its own."""

    config: TrainConfig
    plan: Plan
    shape: ModelShape

    def step(self, micro: Micro) -> Step:
        checkpointing, offload, examples, longest, accumulating = micro
        plan = replace(self.plan, checkpointing=checkpointing, offload=offload, seq_len=longest)
        return replace(step_of(self.config, plan, self.shape, "train", examples), accumulating=accumulating)

    @cached_property
    def model(self):
        return build(self.step(("off", False, 1, 64, False)))

    def record(self, micro: Micro) -> tuple[list[Event], list[Event], list[Event]]:
        """(loading, what comes before the micro-batch, the micro-batch): the events of one dry run."""
        marks: list[int] = []
        seen: dict[str, Any] = {}

        def tracker() -> MemoryTracker:
            seen["tracker"] = MemoryTracker()
            return seen["tracker"]

        def forward(*args: Any) -> Any:
            marks.append(len(seen["tracker"].trace))
            return worker_forward(*args)

        def update(optimizer: Any) -> None:
            marks.append(len(seen["tracker"].trace))
            worker_update(optimizer)

        def loaded(*args: Any) -> list[Event]:
            seen["loading"] = worker_load(*args)
            marks.append(len(seen["tracker"].trace))
            return seen["loading"]

        worker_forward, worker_update, worker_load = worker.forward, worker.update, worker.load
        with patch.multiple(worker, MemoryTracker=tracker, forward=forward, update=update, load=loaded):
            worker.run(self.step(micro), self.model)
        start, _, begin, end = marks  # loaded, the first update, the forward pass, the second update
        trace = seen["tracker"].trace
        return seen["loading"], trace[start:begin], trace[begin:end]

    def before(self) -> list[Event]:
        """The model and the optimizer's state arrive."""
        loading, setup, _ = self.record(("off", False, 1, 64, False))
        return [*loading, *((("workspace", number), CUBLAS_WORKSPACES // 2) for number in (0, 1)), *setup]

    def own(self, micro: Micro) -> list[Event]:
        """What the micro-batch allocates, and what of that it frees."""
        _, _, events = self.record(micro)
        number = {name: place for place, (name, size) in enumerate(events) if size > 0}
        return [(number[name], size) for name, size in events if name in number]

    def traces(self, needed: set[Micro]) -> dict[Micro, list[Event]]:
        """The events of each, from dry runs of the most different ones of its kind."""
        kinds = defaultdict(list)
        for micro in sorted(needed):
            kinds[kind_of(micro)].append(micro)
        return {micro: events for group in kinds.values() for micro, events in self._of_one_kind(group)}

    def _of_one_kind(self, group: list[Micro]) -> Iterator[tuple[Micro, list[Event]]]:
        by_tokens = sorted(group, key=lambda micro: (micro[2] * micro[3], micro[3]))
        chosen = [by_tokens[round(place)] for place in np.linspace(0, len(group) - 1, min(SAMPLES, len(group)))]
        recorded = {micro: self.own(micro) for micro in dict.fromkeys(chosen)}
        names = {tuple((name, size > 0) for name, size in events) for events in recorded.values()}
        assert len(names) == 1, f"{kind_of(group[0])}: {len(names)} orders of allocations"
        sizes = np.array([[size for _, size in events] for events in recorded.values()], float)
        parts, *_ = np.linalg.lstsq(np.array([parts_of(micro) for micro in recorded], float), sizes, rcond=None)
        order = next(iter(names))
        for micro in group:
            told = np.maximum(1, np.rint(parts_of(micro) @ parts)).astype(int)
            yield (
                micro,
                recorded.get(micro) or [(name, int(size) if new else -1) for (name, new), size in zip(order, told)],
            )


def steps_of(plan: Plan, lengths: list[int], batch: int, number: int) -> list[list[Micro]]:
    """Random steps, cut by the plan."""
    draw, steps = Random(0), []
    for _ in range(number):
        step = draw.sample(lengths, batch)
        pieces = [(plan.modes[piece.mode], len(piece.examples), piece.longest) for piece in cut(step, plan.modes)]
        steps.append(
            [
                (mode.checkpointing, mode.offload, n, longest, place > 0)
                for place, (mode, n, longest) in enumerate(pieces)
            ]
        )
    return steps


def replay(
    before: list[Event], steps: list[list[Micro]], traces: dict[Micro, list[Event]], expandable: bool, capacity: int
) -> int:
    """Peak of what is reserved. Raises OutOfMemory as a card would."""
    allocator, number = FullCard(expandable, capacity).run(before), 0
    for step in steps:
        gradients = []
        for micro in step:
            alive, number = set(), number + 1
            for name, size in traces[micro]:
                if size > 0:
                    allocator.malloc((number, name), size)
                    alive.add(name)
                else:
                    allocator.free((number, name))
                    alive.discard(name)
            gradients += [(number, name) for name in alive]
        for name in gradients:  # the optimizer's step is over
            allocator.free(name)
    return allocator.peak_reserved


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("card", choices=KNOWN_GPUS, metavar="CARD")
    parser.add_argument("model", choices=CATALOG, metavar="MODEL")
    parser.add_argument("--steps", type=int, default=1000)
    arguments = parser.parse_args()
    config, lengths = TrainConfig(max_length=1024, effective_batch_size=16), json.loads(LENGTHS.read_text())["lengths"]
    row, plans, steps = CATALOG[arguments.model], {}, {}
    for expandable in (True, False):
        gpu = replace(KNOWN_GPUS[arguments.card], expandable=expandable)
        plans[expandable] = make_plan(config, gpu, row, lengths=lengths, exact=True)
        steps[expandable] = steps_of(plans[expandable], lengths, config.effective_batch_size, arguments.steps)
    recorder = Recorder(config, plans[True], row.shape)
    shapes = {expandable: {micro for step in cut_up for micro in step} for expandable, cut_up in steps.items()}
    traces, before = recorder.traces(shapes[True] | shapes[False]), recorder.before()
    failed = 0
    for expandable, plan in plans.items():
        capacity = plan.budget + HEADROOM[expandable] - CUDA_CONTEXT
        count = f"{sum(map(len, steps[expandable]))} micro-batches of {len(shapes[expandable])} shapes"
        try:
            found = f"{replay(before, steps[expandable], traces, expandable, capacity) / GIB:.2f} GiB in sequence"
        except OutOfMemory as error:
            failed, found = failed + 1, f"OUT OF MEMORY, {error}"
        alone = f"largest alone {(plan.largest_bytes - CUDA_CONTEXT) / GIB:.2f}, planned {capacity / GIB:.2f}"
        print(f"{'segments that grow' if expandable else 'plain segments'}: {count}, {found}; {alone}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())

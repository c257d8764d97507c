"""The rules of PyTorch's caching allocator, one by one, and a random walk that must never lose a byte."""

import random

import pytest

from helpers.dryrun.allocator import MIB, CachingAllocator, simulate

# name -> (trace, allocated, reserved, and reserved in a segment that grows), in MiB
RULES = {
    "small requests share a segment": ([(n, 1000 / MIB) for n in range(100)], 100 / 1024, 2, 2),
    "a medium request takes 20 MiB": ([("a", 3)], 3, 20, 20),
    "and shares them with the next": ([("a", 3), ("b", 17)], 20, 20, 20),
    "a large request takes its own size": ([("a", 4), ("b", 17)], 4 + 18, 20 + 18, 40),
    "rounded up": ([("a", 33)], 34, 34, 40),
    "a remainder above one MiB is given to others": ([("a", 3), ("b", 15), ("c", 2)], 20, 20, 20),
    "freed neighbors merge": (
        [("a", 40), ("a", -1), ("b", 20), ("c", 20), ("b", -1), ("c", -1), ("d", 40)],
        40,
        40,
        40,
    ),
    "a hole that is too small stays": ([("a", 40), ("b", 40), ("a", -1), ("c", 60)], 100, 140, 140),
    "a segment grows at its free end": ([("a", 40), ("b", 40), ("b", -1), ("c", 60)], 100, 140, 100),
}


@pytest.mark.parametrize("rule", RULES)
def test_a_rule(rule):
    trace, allocated, reserved, growing = RULES[rule]
    trace = [(name, round(size * MIB) if size > 0 else -1) for name, size in trace]
    plain, expandable = simulate(trace), simulate(trace, expandable=True)
    assert (plain.reserved, expandable.reserved) == (reserved * MIB, growing * MIB)
    assert plain.allocated == allocated * MIB >= expandable.allocated


def test_a_remainder_up_to_one_mebibyte_stays_in_its_block_and_counts_as_allocated():
    for size in (19 * MIB + 1, 20 * MIB):
        assert simulate([("a", size)]).allocated == 20 * MIB
    assert simulate([("a", 15 * MIB)]).allocated == 16 * MIB
    assert simulate([("a", 15 * MIB)], expandable=True).allocated == 15 * MIB


def test_peaks_are_counted_after_what_came_before():
    before = [("a", 60 * MIB), ("a", -1), ("b", 30 * MIB)]
    later = simulate([("c", 20 * MIB)], before)
    assert later.peak_allocated == 50 * MIB and later.peak_reserved == 60 * MIB
    assert simulate([("c", -1)], [*before, ("c", 20 * MIB)]).peak_allocated == 50 * MIB


@pytest.mark.parametrize("expandable", [False, True])
def test_a_random_walk_keeps_the_books(expandable):
    rng, allocator, live = random.Random(0), CachingAllocator(expandable=expandable), []
    for step in range(5000):
        if live and rng.random() < 0.49:
            allocator.free(live.pop(rng.randrange(len(live))))
        else:
            allocator.malloc(step, int(2 ** rng.uniform(8, 27)))
            live.append(step)
        free = sum(block.size for blocks in allocator._free.values() for block in blocks)
        assert allocator.allocated + free == allocator.reserved <= allocator.peak_reserved
    for name in live:
        allocator.free(name)
    assert allocator.allocated == 0
    if expandable:  # each pool's segment is one free block again
        assert [len(blocks) for blocks in allocator._free.values()] == [1, 1]

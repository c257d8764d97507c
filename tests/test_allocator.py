"""The rules of PyTorch's caching allocator, one by one, and a random walk that must never lose a byte."""

import random

import pytest

from helpers.dryrun.allocator import MIB, CachingAllocator, OutOfMemory, replay


def test_small_requests_share_one_segment():
    allocator = replay([(n, 1000) for n in range(100)])
    assert allocator.allocated == 100 * 1024 and allocator.reserved == 2 * MIB


def test_medium_requests_take_twenty_mebibytes_and_large_ones_their_own_rounded_size():
    assert replay([("a", 3 * MIB)]).reserved == 20 * MIB
    assert replay([("a", 3 * MIB), ("b", 17 * MIB)]).reserved == 20 * MIB
    assert replay([("a", 4 * MIB), ("b", 17 * MIB)]).reserved == 20 * MIB + 18 * MIB
    assert replay([("a", 33 * MIB)]).reserved == 34 * MIB


def test_a_remainder_up_to_one_mebibyte_stays_in_its_block_and_counts_as_allocated():
    assert replay([("a", 19 * MIB + 1)]).allocated == 20 * MIB
    assert replay([("a", 15 * MIB)]).allocated == 16 * MIB


def test_freed_neighbors_merge_and_are_used_again():
    trace = [("a", 40 * MIB), ("a", -1), ("b", 20 * MIB), ("c", 20 * MIB), ("b", -1), ("c", -1), ("d", 40 * MIB)]
    assert replay(trace).reserved == 40 * MIB


def test_a_hole_that_is_too_small_means_more_is_reserved_than_allocated():
    trace = [("a", 40 * MIB), ("b", 40 * MIB), ("a", -1), ("c", 60 * MIB)]
    allocator = replay(trace)
    assert allocator.allocated == 100 * MIB and allocator.reserved == 140 * MIB


def test_an_expandable_segment_grows_at_its_end():
    trace = [("a", 40 * MIB), ("b", 40 * MIB), ("b", -1), ("c", 60 * MIB)]
    assert replay(trace).reserved == 140 * MIB
    assert replay(trace, expandable=True).reserved == 100 * MIB


def test_unused_segments_go_back_before_the_card_is_called_full():
    trace = [("a", 60 * MIB), ("a", -1), ("b", 80 * MIB)]
    assert replay(trace, capacity=100 * MIB).reserved == 80 * MIB
    with pytest.raises(OutOfMemory, match="100 MiB"):
        replay([("a", 60 * MIB), ("b", 80 * MIB)], capacity=100 * MIB)


@pytest.mark.parametrize("expandable", [False, True])
def test_a_random_walk_keeps_the_books(expandable):
    rng, allocator, live = random.Random(0), CachingAllocator(expandable=expandable), {}
    for step in range(5000):
        if live and rng.random() < 0.49:
            allocator.free(live.pop(rng.choice(list(live))))
        else:
            allocator.malloc(step, int(2 ** rng.uniform(8, 27)))
            live[step] = step
        free = sum(size for blocks in allocator._free.values() for size, _, _ in blocks)
        assert allocator.allocated + free == allocator.reserved <= allocator.peak_reserved
    for name in live:
        allocator.free(name)
    assert allocator.allocated == 0
    allocator.release_unused_segments()
    assert expandable or allocator.reserved == 0

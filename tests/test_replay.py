"""A card that is full, and steps replayed on it."""

import random
import subprocess
import sys

import pytest

from benchmarks.replay import FullCard, OutOfMemory
from helpers.dryrun.allocator import MIB, CachingAllocator


def everything(allocator):
    """Bytes of each pool in the order of their addresses: (size, is it free, has it memory)."""
    rings = []
    for end in allocator._ends.values():
        block, ring = end.after, []
        while block is not end:
            assert block.after.before is block and block.size > 0 and not (block.free and block.before.free)
            ring.append((block.size, block.free, block not in allocator.holes))
            block = block.after
        rings.append(ring)
    return rings


@pytest.mark.parametrize("expandable", [False, True])
def test_with_room_enough_it_is_the_allocator_of_the_dry_run(expandable):
    rng, live = random.Random(0), []
    limited, free = FullCard(expandable, 2**60), CachingAllocator(expandable)
    for step in range(3000):
        if live and rng.random() < 0.49:
            name = live.pop(rng.randrange(len(live)))
            limited.free(name)
            free.free(name)
        else:
            size = int(2 ** rng.uniform(8, 27))
            limited.malloc(step, size)
            free.malloc(step, size)
            live.append(step)
        assert limited.reserved == free.reserved


@pytest.mark.parametrize("expandable", [False, True])
def test_a_full_card_takes_what_is_free_from_others_and_keeps_the_books(expandable):
    rng, live, refused = random.Random(2), [], []
    card = FullCard(expandable, 3000 * MIB)
    for step in range(6000):
        if live and rng.random() < 0.49:
            card.free(live.pop(rng.randrange(len(live))))
            continue
        try:
            card.malloc(step, int(2 ** rng.uniform(8, 28)))
            live.append(step)
        except OutOfMemory:
            refused.append(card.allocated / card.capacity)
            for _ in range(1 + len(live) // 4):
                card.free(live.pop(rng.randrange(len(live))))
        if step % 100 == 0:
            free = sum(block.size for blocks in card._free.values() for block in blocks)
            assert card.allocated + free == card.reserved <= card.peak_reserved <= card.capacity
            if expandable:
                mapped = sum(size for ring in everything(card) for size, _, has_memory in ring if has_memory)
                assert mapped == card.reserved
    assert refused and min(refused) > (0.85 if expandable else 0.6)


def test_pages_in_the_middle_of_a_segment_that_grows_are_given_to_others():
    card = FullCard(True, 200 * MIB)
    for name, size in (("a", 60), ("b", 20), ("c", 60), ("d", 20)):
        card.malloc(name, size * MIB)
    card.free("a")
    card.free("c")  # two holes of 60 MiB, and 40 MiB that were never taken
    card.malloc("e", 100 * MIB)
    assert card.allocated == 140 * MIB and card.reserved <= 200 * MIB
    with pytest.raises(OutOfMemory):
        FullCard(False, 200 * MIB).run([("a", 60 * MIB), ("b", 20 * MIB), ("c", 100 * MIB), ("a", -1), ("d", 81 * MIB)])


@pytest.mark.slow
def test_micro_batches_of_many_shapes_fit_one_after_the_other(root, say):
    """The command with fewer steps; README names the one with 1,000."""
    command = [sys.executable, "-m", "benchmarks.replay", "RTX 4060", "Llama-3.1-8B-Instruct", "--steps", "12"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    say(done.stdout)
    assert done.returncode == 0 and done.stdout.count("GiB in sequence") == 2, done.stdout + done.stderr

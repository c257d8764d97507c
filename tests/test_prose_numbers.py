"""A number that a machine or a model decides is printed by a cell; what stands in prose has been looked at. Needs no torch."""

import pytest

from tools.prose_numbers import REASONS, candidates, fragments, reviewed

AGAIN = "run `python -m tools.prose_numbers --write`, then look at each line with ? in tests/numbers_in_prose.txt"


def test_every_number_in_prose_has_been_looked_at():
    new = [place for place in candidates() if place not in reviewed()]
    assert not new, f"new or changed numbers; {AGAIN}"


def test_the_list_holds_nothing_that_is_gone():
    gone = [place for place in reviewed() if place not in candidates()]
    assert not gone, AGAIN


def test_every_number_has_a_reason():
    without = [place for place, reason in reviewed().items() if reason.partition(":")[0] not in REASONS]
    assert not without, f"the reason must be one of {', '.join(REASONS)}"


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("It takes about 3.5 minutes on 2 cores.", ["It takes about 3.5 minutes on 2 cores."]),
        ("A 7B model needs 28 GB.", ["A 7B model needs 28 GB."]),
        ("between 20–30 % and at most 1,200 tokens/s", ["between 20–30 % and at most", "% and at most 1,200 tokens/s"]),
        ('four times smaller, or "4x"', ['four times smaller, or "4x"', 'four times smaller, or "4x"']),
        ("| laptop | about 4 minutes on 2 cores | 3 GB of RAM |", ["about 4 minutes on 2 cores", "3 GB of RAM"]),
        ("NF4 keeps 4 bits in blocks of 64; step 12; r=16; 2 x 4 examples; held-out ones; notebook 05", []),
        ("`--limit 5 GB` and [a page](https://example.org/5%20GB)", []),
        ("```\n5 seconds\n```", []),
    ],
)
def test_what_counts_as_a_number(text, numbers):
    assert fragments(text) == numbers

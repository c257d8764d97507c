"""The helpers must cost next to nothing beside the same training written directly with TRL."""

import sys

import pytest

pytestmark = pytest.mark.slow


def test_the_helpers_add_five_percent_or_less(monkeypatch, say):
    from benchmarks import overhead

    monkeypatch.setattr(sys, "argv", ["overhead"])
    ratio = overhead.main()
    say(f"helpers take {ratio:.3f} times as long as bare TRL")
    assert ratio <= 1.05 * 1.05  # the bar, and five percent for the noise of the machine

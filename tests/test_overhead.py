"""The helpers must cost next to nothing beside the same training written directly with TRL."""

import sys

import pytest

pytestmark = pytest.mark.slow


def test_the_helpers_add_five_percent_or_less(monkeypatch, capsys):
    from benchmarks import overhead

    monkeypatch.setattr(sys, "argv", ["overhead"])
    ratio = overhead.main()
    with capsys.disabled():
        print("\n" + capsys.readouterr().out)
    assert ratio <= 1.05 * 1.05  # the bar, and five percent for the noise between two medians of a few runs

"""Cutting by tokens is quicker, by the dry run's counted work. One card and model; `python -m benchmarks.planned_seconds` has nine."""

import pytest

from benchmarks.planned_seconds import Row


@pytest.mark.slow
def test_steps_cut_by_tokens_are_quicker_than_equal_micro_batches(say):
    row = Row("RTX 3060", "Llama-3.1-8B-Instruct").table()
    say(", ".join(f"{name} {value:.3f}" for name, value in row.items()))
    assert row["error"] < 0.01, "the dry runs are told by three costs"
    assert row["against_usual"] > 1.5 and row["against_before"] > 1.5
    assert row["padding"] <= 0.15 < row["padding_usual"]

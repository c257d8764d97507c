"""What we claim about memory, checked by the command that anyone can run: `python -m benchmarks.memory_accuracy`."""

import pytest

from benchmarks import memory_accuracy

pytestmark = pytest.mark.slow


def test_the_dry_run_agrees_with_41_measured_t4_steps(say):
    errors = memory_accuracy.t4()
    for kind, (mean, worst) in errors.items():
        say(f"41 T4 steps, {kind}: mean {mean:.2%}, worst {worst:+.2%}")
    assert errors["allocated"][0] <= 0.003 and abs(errors["allocated"][1]) <= 0.01
    assert errors["reserved"][0] <= 0.04


def test_the_formula_agrees_with_the_dry_run(say):
    errors = memory_accuracy.grid(tokens=[512, 8192])
    say(f"formula against dry run: mean {memory_accuracy.mean(errors):.2%}, {min(errors):+.2%} to {max(errors):+.2%}")
    assert memory_accuracy.mean(errors) <= 0.03 and min(errors) >= -0.01

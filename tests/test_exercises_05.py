"""The checks of lesson 05: right, wrong, missing and absurd answers; and what its charts and helpers are made of."""

from math import exp

import numpy as np
import pytest

from helpers.metrics import bootstrap_interval
from notebooks.lessons.lesson_05 import (
    FAULTS,
    FaultyRun,
    bootstrap_chart,
    check_interval,
    check_step_to_keep,
    check_stopping,
    faulty_runs,
    four_curves,
    loss_by_part,
    reveal,
    spans,
)

CURVE = [(0, 1.0), (2, 3.0), (4, 2.5), (6, 2.9)]  # step 0, the untrained model, does not count


def rule(losses, patience):
    best, waited = float("inf"), 0
    for number, loss in enumerate(losses, start=1):
        waited = 0 if loss < best else waited + 1
        best = min(best, loss)
        if waited >= patience:
            return number
    return None


def never_resets(losses, patience):
    worse = [number for number, loss in enumerate(losses, start=1) if loss >= min(losses[: number - 1], default=9)]
    return worse[patience - 1] if len(worse) >= patience else None


def from_zero(losses, patience):
    return None if rule(losses, patience) is None else rule(losses, patience) - 1


def paired(before, after):
    differences = np.array(after) - np.array(before)
    chosen = np.random.default_rng(7).integers(0, len(differences), (3000, len(differences)))
    return tuple(np.quantile(differences[chosen].mean(axis=1), [0.025, 0.975]))


def unpaired(before, after):
    chance, count = np.random.default_rng(7), len(before)
    means = [np.array(values)[chance.integers(0, count, (3000, count))].mean(axis=1) for values in (before, after)]
    return tuple(np.quantile(means[1] - means[0], [0.025, 0.975]))


def spread(before, after):
    return tuple(np.quantile(np.array(after) - np.array(before), [0.025, 0.975]))


@pytest.mark.parametrize(
    ("answer", "beginning", "holds"),
    [
        (None, "Your turn", ""),
        ((4, exp(0.4)), "Right", "1.5 times"),
        ((4.0, 1.49), "Right", ""),
        ((0, exp(0.4)), "Not yet", "lowest"),
        ((6, 1.0), "Not yet", "lowest"),
        ((4, 2.9 / 2.5), "Not yet", "exp(loss)"),
        ((4, exp(-0.4)), "Not yet", "other way round"),
        ((4, 7), "Not yet", "the step is right"),
        ((4, float("nan")), "Not yet", ""),
        ("four", "Not yet", "pair"),
        (4, "Not yet", "pair"),
        ((4, None), "Not yet", "pair"),
    ],
)
def test_step_to_keep(answer, beginning, holds, said):
    line = said(check_step_to_keep, answer, CURVE)
    assert line.startswith(beginning) and holds in line


@pytest.mark.parametrize(
    ("answer", "beginning", "holds"),
    [
        (None, "Your turn", ""),
        (rule, "Right", ""),
        (never_resets, "Not yet", "losses="),
        (from_zero, "Not yet", "from 1"),
        (lambda losses, patience: None, "Not yet", "gives None"),
        (lambda losses, patience: losses[99], "Not yet", "IndexError"),
        (lambda losses: 1, "Not yet", "TypeError"),
        (3, "Not yet", "function itself"),
    ],
)
def test_stopping(answer, beginning, holds, said):
    line = said(check_stopping, answer)
    assert line.startswith(beginning) and holds in line


@pytest.mark.parametrize(
    ("answer", "beginning", "holds"),
    [
        (None, "Your turn", ""),
        (paired, "Right", ""),
        (lambda before, after: bootstrap_interval(np.subtract(after, before), seed=3), "Right", ""),
        (unpaired, "Not yet", "apart from each other"),
        (spread, "Not yet", "single differences"),
        (lambda before, after: paired(after, before), "Not yet", "sign"),
        (lambda before, after: bootstrap_interval(after), "Not yet", "mean of the differences"),
        (lambda before, after: (0.12, 0.12), "Not yet", ""),
        (lambda before, after: None, "Not yet", "TypeError"),
        (lambda before, after: ("a", "b"), "Not yet", "ValueError"),
        ((0, 1), "Not yet", "function itself"),
    ],
)
def test_interval(answer, beginning, holds, said):
    line = said(check_interval, answer)
    assert line.startswith(beginning) and holds in line


@pytest.mark.slow
def test_four_runs_are_trained_and_only_revealed_when_asked(job):
    config = job.pop("config")
    config.max_steps, config.num_evaluations, config.max_eval_samples = 3, 2, 4
    runs = faulty_runs(config, **job)
    assert sorted(runs) == list("ABCD") and {run.fault for run in runs.values()} == set(FAULTS)
    assert not any(kind in repr(run) for run in runs.values() for kind in FAULTS)
    for run in runs.values():
        assert [event["step"] for event in run.history if "eval_loss" in event] == [0, 2, 3]
        assert [event["step"] for event in run.history if "loss" in event] == [1, 2, 3]
    untrained = [run.history[0]["eval_loss"] for run in runs.values()]
    assert max(untrained) - min(untrained) < 1e-6  # all begin as the same model
    table = reveal(runs, {"A": "healthy"})
    assert table.loc["A", "you said"] == "healthy" and table.loc["B", "you said"] == "?"
    assert len(four_curves(runs, 3).axes) == 4


def test_a_loss_that_is_no_number_is_drawn_and_called_diverged():
    history = [{"step": 0, "eval_loss": 4.0}, {"step": 1, "loss": 4.1}, {"step": 2, "loss": None}]
    runs = {"A": FaultyRun("diverged", 1.0, 4, history)}
    figure = four_curves(runs, 3)
    assert "not a number" in [text.get_text() for text in figure.axes[0].texts]
    assert reveal(runs).loc["A", "the verdict on its curve"].startswith("diverged")


def test_the_bootstrap_chart_writes_the_intervals():
    figure = bootstrap_chart({"before": [0.1, 0.2], "after": [0.6, 0.7]}, {"before": (0.1, 0.2), "after": (0.6, 0.7)})
    assert {"10% to 20%", "60% to 70%"} <= {text.get_text() for text in figure.axes[0].texts}


def test_phrases_are_found_in_order():
    assert spans("Hello Ann, you can: go", ["Hello ", "you can: ", "missing"]) == [(0, 6), (11, 20)]


def test_both_parts_of_the_loss_make_up_the_whole(job):
    from helpers.evaluation import answer_losses

    model, tokenizer, examples = job["model"], job["tokenizer"], job["validation"].select(range(3))
    fixed, other = loss_by_part(model, tokenizer, examples, ["The sum is "])
    answers = [row["completion"][0]["content"] for row in examples]
    tokens = [
        len("The sum is "),
        len(answers[0]) - len("The sum is "),
    ]  # the tiny tokenizer has one token per character
    assert all(len(answer) == len(answers[0]) for answer in answers)
    total = (fixed * tokens[0] + other * tokens[1]) / sum(tokens)
    longer = [
        loss / count for loss, count in answer_losses(model, tokenizer, examples)
    ]  # these count the end token too
    assert total == pytest.approx(sum(longer) / 3, rel=0.1)
    with pytest.raises(ValueError, match="do not hold both"):
        loss_by_part(model, tokenizer, examples, ["no such words"])

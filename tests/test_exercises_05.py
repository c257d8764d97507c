"""The checks of lesson 05: right, wrong, missing and absurd answers; and what its charts and helpers are made of."""

from functools import partial
from math import exp

import numpy as np
import pytest

from helpers.metrics import bootstrap_interval
from notebooks.lessons import lesson_05 as lesson
from tests.exercises import answers

CURVE = [(0, 1.0), (2, 3.0), (4, 2.5), (6, 2.9)]  # step 0, the untrained model, does not count
LESSONS = [(0, 4.24), (4, 2.52), (16, 3.64)]  # exp(1.12) = 3.065


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


def bootstrap(level=0.95, draws=3000):
    def interval(before, after):
        gains = np.subtract(after, before)
        drawn = gains[np.random.default_rng(7).integers(0, len(gains), (draws, len(gains)))]
        return tuple(np.quantile(drawn.mean(axis=1), [(1 - level) / 2, (1 + level) / 2]))

    return interval


def unpaired(before, after):
    chance, count = np.random.default_rng(7), len(before)
    means = [np.array(values)[chance.integers(0, count, (3000, count))].mean(axis=1) for values in (before, after)]
    return tuple(np.quantile(means[1] - means[0], [0.025, 0.975]))


def normal(quantile):
    """From the mean and its standard error, without resampling."""

    def interval(before, after):
        differences = np.subtract(after, before)
        half = quantile * differences.std(ddof=1) / len(differences) ** 0.5
        return differences.mean() - half, differences.mean() + half

    return interval


@answers(
    {
        partial(lesson.check_step_to_keep, curve=CURVE): [
            ((4, exp(0.4)), "Right"),
            ((4.0, 1.49), "Right. The last step would choose, at each token, among 1.5 times"),
            ((4, 1.5), "Right"),
            ((0, exp(0.4)), "lowest"),
            ((6, 1.0), "lowest"),
            ((4, 2.9 / 2.5), "ratio of the losses"),
            ((4, exp(-0.4)), "other way round"),
            ((4, 7), "the step is right"),
            ((4, float("nan")), "the step is right"),
            ("four", "pair"),
            ((4, None), "pair"),
        ],
        partial(lesson.check_step_to_keep, curve=LESSONS): [
            ((4, 3.1), "Right. The last step would choose, at each token, among 3.1 times"),
            ((4, 3.07), "Right"),
            ((4, 3), "the ratio is not"),
            ((4, 3.2), "the ratio is not"),
            ((4, 3.64 / 2.52), "ratio of the losses"),
            ((16, 3.1), "lowest"),
        ],
        lesson.check_stopping: [
            (rule, "Right"),
            (lambda losses, patience: np.int64(found) if (found := rule(losses, patience)) else None, "Right"),
            (never_resets, "losses="),
            (
                lambda losses, patience: (rule(losses, patience) or 1) - 1,
                "losses=[], patience=1 gives 0, and should give None.",
            ),
            (lambda losses, patience: None, "losses=[1.0, 1.0], patience=1 gives None, and should give 2."),
            (lambda losses, patience: rule([-loss for loss in losses], patience), "and should give"),
            (lambda losses, patience: np.array(losses), "your function returns array"),
            (lambda losses, patience: losses[99], "IndexError"),
            (lambda losses: 1, "TypeError"),
        ],
        lesson.check_interval: [
            (bootstrap(), "Right"),
            (bootstrap(draws=1000), "Right"),
            (lambda before, after: bootstrap_interval(np.subtract(after, before), seed=3), "Right"),
            (normal(1.96), "Right"),
            (bootstrap(level=0.9), "it is 84% as wide"),
            (bootstrap(level=0.99), "as wide as it should be"),
            (bootstrap(draws=20), "as wide as it should be"),
            (unpaired, "apart from each other"),
            (lambda before, after: np.quantile(np.subtract(after, before), [0.025, 0.975]), "single improvements"),
            (lambda before, after: bootstrap()(after, before), "sign"),
            (lambda before, after: bootstrap_interval(after), "mean of the improvements"),
            (lambda before, after: (0.12, 0.12), "it is 0% as wide"),
            (lambda before, after: None, "returns None"),
            (lambda before, after: ("a", "b"), "returns ('a', 'b')"),
        ],
    }
)
def test_answers(said, check, answer, words):
    said(check, answer, words)


@pytest.mark.slow
def test_four_runs_are_trained_and_only_revealed_when_asked(job):
    config = job.pop("config")
    config.max_steps, config.num_evaluations, config.max_eval_samples = 3, 2, 4
    runs = lesson.faulty_runs(config, **job)
    assert sorted(runs) == list("ABCD") and {run.fault for run in runs.values()} == set(lesson.FAULTS)
    assert not any(kind in repr(run) for run in runs.values() for kind in lesson.FAULTS)
    for run in runs.values():
        assert [event["step"] for event in run.history if "eval_loss" in event] == [0, 2, 3]
        assert [event["step"] for event in run.history if "loss" in event] == [1, 2, 3]
    untrained = [run.history[0]["eval_loss"] for run in runs.values()]
    assert max(untrained) - min(untrained) < 1e-6  # all begin as the same model
    table = lesson.reveal(runs, {"A": "healthy"})
    assert table.loc["A", "you said"] == "healthy" and table.loc["B", "you said"] == "?"
    assert len(lesson.four_curves(runs, 3).axes) == 4


def test_a_loss_that_is_no_number_is_drawn_and_called_diverged():
    history = [{"step": 0, "eval_loss": 4.0}, {"step": 1, "loss": 4.1}, {"step": 2, "loss": None}]
    runs = {"A": lesson.FaultyRun("diverged", 1.0, 4, history)}
    figure = lesson.four_curves(runs, 3)
    assert "not a number ↑" in [text.get_text() for text in figure.axes[0].texts]
    assert lesson.reveal(runs).loc["A", "the verdict on its curve"].startswith("diverged")


def test_the_bootstrap_chart_writes_the_intervals():
    means = {"before": [0.1, 0.2], "after": [0.6, 0.7]}
    figure = lesson.bootstrap_chart(means, {"before": (0.1, 0.2), "after": (0.6, 0.7)})
    assert [text.get_text() for text in figure.axes[0].texts] == ["10% to 20%", "60% to 70%"]


def test_both_parts_of_the_loss_make_up_the_whole(job):
    from helpers.evaluation import answer_losses

    model, tokenizer, examples = job["model"], job["tokenizer"], job["validation"].select(range(3))
    fixed, other = lesson.loss_by_part(model, tokenizer, examples, ["The sum", " is "])
    lengths = {len(row["completion"][0]["content"]) for row in examples}
    [letters], phrase = lengths, len("The sum is ")  # the tiny tokenizer has one token per letter
    total = (fixed * phrase + other * (letters - phrase)) / letters
    longer = [loss / count for loss, count in answer_losses(model, tokenizer, examples)]  # with the end token
    assert total == pytest.approx(sum(longer) / 3, rel=0.1)
    with pytest.raises(ValueError, match="do not hold both"):
        lesson.loss_by_part(model, tokenizer, examples, ["no such words"])

"""Checks for lesson 05: the step to keep, a rule that stops, and an interval for an improvement."""

from __future__ import annotations

import random
from collections.abc import Sequence
from math import exp
from typing import Any

import numpy as np

from helpers.evaluation import bootstrap_interval

NEAR = 0.02  # a ratio may be rounded to two digits
LISTS = 200  # of random validation losses that a stopping rule is tried on
LETTERS = 40  # scores in each trial of an interval


def check_step_to_keep(answer: Any, curve: Sequence[tuple[int, float]]) -> None:
    """Is `answer` (the step to keep, perplexity at the end / perplexity at that step)?

    Args:
        curve: (step, validation loss); the first is the untrained model.
    """
    if answer is None:
        return print("Your turn: replace None by a pair, (step, ratio).")
    try:
        step, ratio = (float(value) for value in answer)
    except (TypeError, ValueError):
        return print("Not yet: the answer is a pair of two numbers, (step, ratio).")
    best_step, best = min(curve[1:], key=lambda point: point[1])
    last = curve[-1][1]
    if step != best_step:
        return print(
            "Not yet: the step to keep is the one where the validation loss is lowest, whatever training did afterwards."
        )
    wanted = exp(last - best)
    if abs(ratio - last / best) <= NEAR and abs(ratio - wanted) > NEAR:
        return print("Not yet: that is the ratio of the losses. Perplexity is exp(loss); divide those.")
    if abs(ratio - 1 / wanted) <= NEAR and abs(ratio - wanted) > NEAR:
        return print("Not yet: it is the other way round. The last step is the worse one, so the ratio is above 1.")
    if not abs(ratio - wanted) <= NEAR:
        return print(
            "Not yet: the step is right. For the ratio, take exp() of both losses and divide the last by the best."
        )
    print(
        f"Right. Keeping the last step would mean to choose, at each token, among {wanted:.1f} times as many candidates as the best step."
    )


def check_stopping(answer: Any) -> None:
    """Does `answer(losses, patience)` give the number of the evaluation after which training stops, or None if it never does?"""
    if answer is None:
        return print("Your turn: write the function, then hand it to the check.")
    if not callable(answer):
        return print("Not yet: the check needs the function itself, without brackets.")
    chance = random.Random(0)
    trials = [
        ([3.0, 2.0, 2.1, 2.2, 1.9], 2),
        ([3.0, 2.0, 2.1, 1.9, 2.0, 2.1], 2),
        ([3.0, 2.0, 1.0], 1),
        ([2.0, 2.0, 2.0], 2),
        ([], 1),
    ]
    trials += [
        ([chance.choice([1.0, 1.5, 2.0, 2.5]) for _ in range(chance.randint(1, 9))], chance.randint(1, 4))
        for _ in range(LISTS)
    ]
    for losses, patience in trials:
        try:
            given = answer(list(losses), patience)
        except Exception as error:
            return print(
                f"Not yet: for losses={losses}, patience={patience} your function raises {type(error).__name__}: {error}."
            )
        wanted = _stops_after(losses, patience)
        if isinstance(given, bool) or given != wanted:
            return print(
                f"Not yet: losses={losses}, patience={patience} gives {given!r}. Count the evaluations in a row that are not below the "
                "best so far, set the count back to 0 at each new best, and number the evaluations from 1."
            )
    print(f"Right, on {len(trials)} lists. The same rule stops the kit's runs; an equal loss is no new best.")


def check_interval(answer: Any) -> None:
    """Does `answer(before, after)` give the 95 % bootstrap interval of the mean improvement, pair by pair?"""
    if answer is None:
        return print("Your turn: write the function, then hand it to the check.")
    if not callable(answer):
        return print("Not yet: the check needs the function itself, without brackets.")
    for seed in range(3):
        before, after = _scores(seed)
        try:
            low, high = (float(value) for value in answer(before.tolist(), after.tolist()))
        except Exception as error:
            return print(
                f"Not yet: your function must take two lists and return (low, high); {type(error).__name__}: {error}."
            )
        wanted = bootstrap_interval(after - before)
        if _near((low, high), wanted):
            continue
        return print(f"Not yet: {_hint(before, after, (low, high), wanted)}")
    print(
        "Right. In pairs, the interval is much narrower than that of either mean: what makes one letter harder than another cancels out."
    )


def _stops_after(losses: Sequence[float], patience: int) -> int | None:
    best, waited = float("inf"), 0
    for number, loss in enumerate(losses, start=1):
        best, waited = (loss, 0) if loss < best else (best, waited + 1)
        if waited >= patience:
            return number
    return None


def _scores(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Letters that differ much from each other, and improve by about the same amount."""
    chance = np.random.default_rng(seed)
    before = chance.uniform(0.0, 0.7, LETTERS)
    return before, before + chance.normal(0.12, 0.08, LETTERS)


def _near(found: tuple[float, float], wanted: tuple[float, float], share: float = 0.3) -> bool:
    """Both ends within `share` of the width: a bootstrap of another seed lies well within."""
    allowed = share * (wanted[1] - wanted[0])
    return bool(abs(found[0] - wanted[0]) <= allowed and abs(found[1] - wanted[1]) <= allowed)


def _hint(before: np.ndarray, after: np.ndarray, found: tuple[float, float], wanted: tuple[float, float]) -> str:
    low, high = found
    if _near((-high, -low), wanted):
        return "the sign is turned round. An improvement is after minus before."
    centre = (low + high) / 2
    if abs(centre - (wanted[0] + wanted[1]) / 2) > wanted[1] - wanted[0]:
        return "the interval should lie around the mean of the differences, after minus before."
    apart = _unpaired_width(before, after)
    if abs((high - low) - apart) < 0.3 * apart:
        return "before and after were redrawn apart from each other. They are pairs: redraw the differences, or the same letters for both."
    if high - low > apart:
        return "that is how the single differences spread. Wanted is how their mean would: redraw the letters, take the mean, many times."
    return "the ends are off. Redraw as many differences as there are, with replacement, take the mean, and do that thousands of times."


def _unpaired_width(before: np.ndarray, after: np.ndarray, draws: int = 2000) -> float:
    chance = np.random.default_rng(0)

    def mean_of(values: np.ndarray) -> np.ndarray:
        return values[chance.integers(0, len(values), (draws, len(values)))].mean(axis=1)

    low, high = np.quantile(mean_of(after) - mean_of(before), [0.025, 0.975])
    return float(high - low)

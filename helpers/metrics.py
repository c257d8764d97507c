"""Score functions (an answer, and mostly the reference, become a number between 0 and 1), and how sure their means are.

def is_short(answer): return len(answer.split()) < 50      # yours may do the same
table = compare_before_after(model, tokenizer, validation, score=is_short)
low, high = bootstrap_interval(table["after_score"])
print(paired_test(table["before_score"], table["after_score"]))      # better on 41 of 60, worse on 7, p < 0.0001
"""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import comb

import numpy as np

Score = Callable[..., float]
# The five lines that every answer of the fictional shop in data_samples/customer_support.jsonl has.
HOUSE_STYLE = re.compile(r"Hello \S+,\nI hear you: .+\nWe will: .+\nYou can: .+\nWarmly, Wren at Copperleaf")
DRAWS = 4000  # of the bootstrap
CLEAR = 0.05  # the usual, arbitrary line below which chance is called unlikely


def follows_house_style(answer: str) -> bool:
    """Does the whole answer have the five lines of Copperleaf's house style, in order and with nothing around them?"""
    return HOUSE_STYLE.fullmatch(answer) is not None


def rouge_l(answer: str, reference: str) -> float:
    """ROUGE-L: how long the longest common subsequence of words is, as F1 (Lin 2004). Words in the same order count, gaps do not."""
    from rapidfuzz.distance import LCSseq

    given, wanted = _words(answer), _words(reference)
    return _f1(LCSseq.similarity(given, wanted), len(given), len(wanted))


def token_f1(answer: str, reference: str) -> float:
    """F1 of the words, in any order: what share of the answer's words is in the reference, and the other way round."""
    given, wanted = _words(answer), _words(reference)
    return _f1((Counter(given) & Counter(wanted)).total(), len(given), len(wanted))


def _words(text: str) -> list[str]:
    """Lower-case words and numbers of any alphabet, without punctuation."""
    return re.findall(r"\w+", text.lower())


def _f1(common: int, given: int, wanted: int) -> float:
    """The harmonic mean of common / given and common / wanted."""
    return 2 * common / (given + wanted) if given + wanted else 1.0


def scored(score: Score, answers: Iterable[str], references: Iterable[str]) -> list[float]:
    """`score` of each answer, given the reference too if it has two arguments without a default."""
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(score).parameters.values()
    if sum(item.kind in positional and item.default is item.empty for item in parameters) > 1:
        return [float(score(answer, reference)) for answer, reference in zip(answers, references)]
    return [float(score(answer)) for answer in answers]


def bootstrap_interval(values: Sequence[float], draws: int = DRAWS, seed: int = 0) -> tuple[float, float]:
    """95 % interval (low, high) of the mean: draw as many examples again, with replacement, thousands of times, and look where the means fall.

    If all values are equal, every drawing is the same and the bootstrap knows nothing; for scores that are all 0 or all 1, the rule
    of three then says what is still possible: 3 / n.
    """
    scores = np.asarray(values, dtype=float)
    if not len(scores):
        raise ValueError("No values, so no interval: score at least one example.")
    if scores.min() == scores.max():
        score, margin = float(scores[0]), min(1.0, 3 / len(scores))
        return {0.0: (0.0, margin), 1.0: (1 - margin, 1.0)}.get(score, (score, score))
    chosen = np.random.default_rng(seed).integers(0, len(scores), (draws, len(scores)))
    low, high = np.quantile(scores[chosen].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)


@dataclass(frozen=True)
class PairedTest:
    """How many examples became better or worse, and how often chance alone would be so one-sided (`p`)."""

    better: int
    worse: int
    equal: int
    p: float

    @property
    def clear(self) -> bool:
        """Below the usual 5 %."""
        return self.p < CLEAR

    def __str__(self) -> str:
        p = "p < 0.0001" if self.p < 0.0001 else f"p = {self.p:.2g}" if self.p < 0.1 else f"p = {self.p:.2f}"
        counts = f"better on {self.better} of {self.better + self.worse + self.equal}, worse on {self.worse}, {p}"
        return counts if self.clear else f"{counts}: that may be chance"


def paired_test(before: Sequence[float], after: Sequence[float]) -> PairedTest:
    """The sign test, two-sided and exact: among the examples that changed, are as many better as worse?

    It asks only which of two scores is higher, so it holds for shares, F1 and anything else. Examples that did not change say
    nothing about the direction and are left out.
    """
    if len(before) != len(after):
        raise ValueError(f"{len(before)} scores before and {len(after)} after: score the same examples twice.")
    better = sum(bool(new > old) for old, new in zip(before, after))
    worse = sum(bool(new < old) for old, new in zip(before, after))
    changed = better + worse
    tail = sum(comb(changed, count) for count in range(min(better, worse) + 1)) / 2**changed
    return PairedTest(better, worse, len(before) - changed, min(1.0, 2 * tail))

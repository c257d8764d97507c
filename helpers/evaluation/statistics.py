"""How sure can one be? A confidence interval for one mean, and a paired test for two.

low, high = bootstrap_interval(table["after_score"])
print(paired_test(table["before_score"], table["after_score"]))      # better on 41 of 60, worse on 7, p < 0.0001
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

import numpy as np

DRAWS = 4000
CLEAR = 0.05  # the usual, arbitrary line below which chance is called unlikely


def bootstrap_interval(
    values: Sequence[float], level: float = 0.95, draws: int = DRAWS, seed: int = 0
) -> tuple[float, float]:
    """(low, high) of the mean: draw as many examples again, with replacement, thousands of times, and look where the means fall.

    If all values are equal, every drawing is the same and the bootstrap knows nothing; for scores that are all 0 or all 1, the rule
    of three then says what is still possible: 3 / n.
    """
    values = np.asarray(values, dtype=float)
    if not len(values):
        raise ValueError("No values, so no interval: score at least one example.")
    if values.min() == values.max():
        value, margin = float(values[0]), min(1.0, 3 / len(values))
        return {0.0: (0.0, margin), 1.0: (1 - margin, 1.0)}.get(value, (value, value))
    chosen = np.random.default_rng(seed).integers(0, len(values), (draws, len(values)))
    low, high = np.quantile(values[chosen].mean(axis=1), [(1 - level) / 2, (1 + level) / 2])
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
        raise ValueError(
            f"{len(before)} scores before and {len(after)} after are no pairs: score the same examples twice."
        )
    better = sum(bool(new > old) for old, new in zip(before, after))
    worse = sum(bool(new < old) for old, new in zip(before, after))
    changed = better + worse
    tail = sum(comb(changed, count) for count in range(min(better, worse) + 1)) / 2**changed
    return PairedTest(better, worse, len(before) - changed, min(1.0, 2 * tail))

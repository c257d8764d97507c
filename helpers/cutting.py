"""How an optimizer step's examples are cut into micro-batches, so that little padding is computed.

    cut([61, 48, 300, 52], modes)        # -> [Piece(examples=(1, 3, 0), mode=0), Piece(examples=(2,), mode=1)]

A step takes the same examples however it is cut, and its loss is a sum over tokens divided by the step's tokens: the gradient is the same to
rounding. Sorted by length, neighbors need little padding; each piece runs in the quickest mode (of checkpointing) that it fits in.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Mode:
    """A way to run a micro-batch: how large one may be, and how long it takes."""

    checkpointing: str
    """"off", "selective" or "on"."""
    offload: bool
    ladder: tuple[tuple[int, int], ...]
    """(tokens of the longest example, how many such examples fit), shorter ones first. Longer than the last: none fits."""
    seconds_per_pass: float
    """Whatever its size: weights are read, unpacked, and kernels launched."""
    seconds_per_token: float
    """Of padded tokens: examples times the longest."""
    seconds_per_pair: float = 0.0
    """Of pairs of tokens that attention compares: examples times the square of the longest."""

    def most_examples(self, longest: int) -> int:
        """How many examples fit, the longest of which has so many tokens. A length between two of the ladder counts as the longer one."""
        step = bisect_left(self.ladder, longest, key=lambda rung: rung[0])
        return self.ladder[step][1] if step < len(self.ladder) else 0

    def seconds(self, examples: int, longest: int) -> float:
        """About how long a micro-batch takes, forward and backward."""
        tokens = examples * longest
        return self.seconds_per_pass + tokens * (self.seconds_per_token + longest * self.seconds_per_pair)


@dataclass(frozen=True)
class Piece:
    """One micro-batch: which of the step's examples it holds, and which of the plan's modes it runs in."""

    examples: tuple[int, ...]
    mode: int


class NothingFits(ValueError):
    """An example is longer than any mode has room for."""


def cut(lengths: Sequence[int], modes: Sequence[Mode]) -> list[Piece]:
    """The quickest way to run examples of these lengths (tokens): dynamic programming over the lengths in order, shortest first.

    Raises:
        NothingFits: one example is too long for every mode.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    best: list[tuple[float, int, int]] = [
        (0.0, 0, 0)
    ]  # seconds of the first n examples; where their last piece begins; its mode
    for end in range(1, len(order) + 1):
        longest = lengths[order[end - 1]]
        options = [
            (best[start][0] + mode.seconds(end - start, longest), start, number)
            for number, mode in enumerate(modes)
            for start in range(max(0, end - mode.most_examples(longest)), end)
        ]
        if not options:
            raise NothingFits(f"An example of {longest} tokens fits in no mode.")
        best.append(min(options))
    pieces: list[Piece] = []
    end = len(order)
    while end:
        _, start, mode = best[end]
        pieces.append(Piece(tuple(order[start:end]), mode))
        end = start
    return pieces[::-1]

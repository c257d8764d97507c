"""How the steps of a run will be cut into micro-batches, told from the lengths of its examples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from helpers.cutting import Mode, cut


@dataclass(frozen=True)
class TypicalCut:
    """Some steps of a run, cut. In words: "16 examples per step in about 5 micro-batches of up to 1,024 tokens, checkpointing off"."""

    examples: int  # in each step
    pieces: float  # micro-batches in a step, on average
    most_tokens: int  # in the largest micro-batch, with padding
    steps_with: dict[
        str, int
    ]  # mode of checkpointing -> in how many steps it runs; the one of most micro-batches first
    padding: float  # share of the computed tokens that belong to no example ...
    padding_if_equal: float  # ... and with about as many micro-batches of equal size, their examples in random order
    seconds: float  # of a step, on average, as the modes count them

    def __str__(self) -> str:
        number = "one micro-batch" if self.pieces == 1 else f"about {self.pieces:.0f} micro-batches"
        usual, *others = self.steps_with
        steps = max(self.steps_with.values())
        needs = [f"{self.steps_with[mode]} of {steps} steps also need it {mode}" for mode in others]
        words = (
            f"{self.examples} examples per step in {number} of up to {self.most_tokens:,} tokens, checkpointing {usual}"
        )
        return words + (f" ({', '.join(needs)})" if needs and steps > 1 else "")


def typical_cut(lengths: Sequence[int], modes: Sequence[Mode], batch: int, steps: int, seed: int) -> TypicalCut:
    """Cut so many steps of `batch` examples, drawn by `seed` from examples of these lengths (tokens)."""
    draw, pieces, steps_with = Random(seed), list[tuple[Mode, int, int]](), Counter[str]()
    drawn = [
        draw.sample(lengths, batch) if len(lengths) >= batch else draw.choices(lengths, k=batch) for _ in range(steps)
    ]
    for step in drawn:
        found = [(modes[piece.mode], len(piece.examples), piece.longest) for piece in cut(step, modes)]
        pieces += found
        steps_with.update({mode.checkpointing for mode, _, _ in found})
    tokens = [examples * longest for _, examples, longest in pieces]
    divisors = [n for n in range(1, batch + 1) if batch % n == 0]
    equal = min(divisors, key=lambda n: abs(batch / n - len(pieces) / steps))
    padded = sum(equal * max(step[start : start + equal]) for step in drawn for start in range(0, batch, equal))
    real, usual = sum(map(sum, drawn)), Counter(mode.checkpointing for mode, _, _ in pieces)
    return TypicalCut(
        batch,
        len(pieces) / steps,
        max(tokens),
        {mode: steps_with[mode] for mode, _ in usual.most_common()},
        1 - real / sum(tokens),
        1 - real / padded,
        sum(mode.seconds(examples, longest) for mode, examples, longest in pieces) / steps,
    )

"""How an optimizer step's examples are cut into micro-batches, so that little padding is computed.

    cut([61, 48, 300, 52], modes)        # -> [Piece(examples=(1, 3, 0), mode=0, longest=61), Piece(examples=(2,), mode=1, longest=300)]

A step takes the same examples however it is cut, and its loss is a sum over tokens divided by the step's tokens: the gradient is the same to
rounding. (With dropout above 0, other pieces draw other masks.) Sorted by length, neighbors need little padding; each piece runs in the
quickest mode (of checkpointing) that it fits in.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from helpers.config import TrainConfig

if TYPE_CHECKING:
    from helpers.plan import Plan

# What a CPU's micro-batch costs besides its padded tokens, counted in tokens: `python -m benchmarks.throughput --cpu-cost` measures both.
# Constants, because a run that is continued must be cut as it was before, to the last bit, and because the best cut hardly depends on them.
TOKENS_PER_PASS = 40.0
TOKENS_PER_PAIR = 0.0004


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

    def halved(self, examples: int, longest: int) -> Mode:
        """This mode after so many examples were too much for the memory: half as many tokens at once, or one example; none if it was one."""
        counted_as = next(length for length, _ in self.ladder if length >= longest)

        def most(before: int, length: int) -> int:
            if examples == 1 and length >= counted_as:
                return 0
            return min(before, max(1, examples * counted_as // 2 // length))

        return replace(self, ladder=tuple((length, most(before, length)) for length, before in self.ladder))

    def __str__(self) -> str:
        return f"checkpointing {self.checkpointing}" + ", activations in host memory" * self.offload


@dataclass(frozen=True)
class Piece:
    """One micro-batch: which of the step's examples it holds, and which of the plan's modes it runs in."""

    examples: tuple[int, ...]
    mode: int
    longest: int
    """Tokens of its longest example, to which the others are padded."""


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
        pieces.append(Piece(tuple(order[start:end]), mode, lengths[order[end - 1]]))
        end = start
    return pieces[::-1]


def quickest(modes: Sequence[Mode], longest: int) -> tuple[Mode, int]:
    """The mode, and how many examples at a time, for examples that all have so many tokens; one, in the last mode, where none has room."""
    options = [(mode, most) for mode in modes if (most := mode.most_examples(longest))]
    return min(options, key=lambda option: option[0].seconds(option[1], longest) / option[1], default=(modes[-1], 1))


def modes_of(config: TrainConfig, plan: Plan) -> tuple[list[Mode], Mode]:
    """The modes of a step's micro-batches, and the one of an evaluation's.

    A plan without modes has room for its micro-batches of the longest examples, so for as many tokens in any other shape. Seconds are then
    counted in a CPU's tokens. `config.micro_batch_size` examples at a time, if it is set, whatever their length.
    """

    def room_for(fewest: int, most: int) -> Mode:
        if config.micro_batch_size:
            return Mode(plan.checkpointing, plan.offload, ((plan.seq_len, fewest),), 1.0, 1e-9)
        sizes = range(max(fewest, most), fewest - 1, -1)
        ladder = tuple((fewest * plan.seq_len // examples, examples) for examples in sizes)
        return Mode(plan.checkpointing, plan.offload, ladder, TOKENS_PER_PASS, 1.0, TOKENS_PER_PAIR)

    modes = getattr(plan, "modes", ()) or (room_for(plan.micro_batch, config.effective_batch_size),)
    evaluating = getattr(plan, "eval_mode", None) or room_for(plan.eval_batch, config.max_eval_samples)
    return list(modes), evaluating

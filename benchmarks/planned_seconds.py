"""How much faster is a step that is cut by tokens? Planned seconds, for cards that you need not own.

    python -m benchmarks.planned_seconds               # three cards x three models (ten minutes of dry runs; the second time, one)
    python -m benchmarks.planned_seconds T4            # one card

16 examples a step, whose lengths are spread as those of Alpaca (benchmarks/data/alpaca_like_lengths.json). The seconds are those of the dry
run's counted operations and bytes, not the cost that the cut makes small. Beside what most people use (two at a time, 8 times, checkpointing
on, examples in random order) stand the equal micro-batches that this kit took before it cut by tokens.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from random import Random
from statistics import median

import numpy as np

from helpers.config import TrainConfig
from helpers.cutting import cut
from helpers.dryrun import measure_once
from helpers.hardware import KNOWN_GPUS, speed
from helpers.plan import Plan, step_of
from helpers.planner import make_plan
from helpers.registry import CATALOG

LENGTHS = Path(__file__).parent / "data" / "alpaca_like_lengths.json"
CONFIG = TrainConfig(max_length=1024, effective_batch_size=16)
STEPS = 200
# Card -> model -> (examples at a time, checkpointing): what was planned for examples of up to 1,024 tokens before steps were cut by tokens.
BEFORE = {
    "T4": {
        "Qwen2.5-1.5B-Instruct": (4, "off"),
        "Llama-3.2-3B-Instruct": (2, "off"),
        "Llama-3.1-8B-Instruct": (1, "off"),
    },
    "RTX 3060": {
        "Qwen2.5-1.5B-Instruct": (2, "off"),
        "Llama-3.2-3B-Instruct": (2, "off"),
        "Llama-3.1-8B-Instruct": (8, "on"),
    },
    "RTX 4060": {
        "Qwen2.5-1.5B-Instruct": (2, "off"),
        "Llama-3.2-3B-Instruct": (1, "off"),
        "Llama-3.1-8B-Instruct": (2, "selective"),
    },
}
USUAL = (2, "on")
# Dry runs of so many examples and tokens tell the work of every shape; CHECKED, how well.
ALONE, PADDED, CHECKED = ((1, 64), (1, 512), (1, 1024)), ((2, 64), (4, 256), (2, 1024), (8, 512)), ((3, 384), (6, 640))
Micro = tuple[str, int, int]  # checkpointing, examples, tokens of the longest


@dataclass
class Row:
    """One card and model."""

    card: str
    model: str

    @cached_property
    def plan(self) -> Plan:
        lengths = json.loads(LENGTHS.read_text(encoding="utf-8"))["lengths"]
        return make_plan(CONFIG, KNOWN_GPUS[self.card], CATALOG[self.model], exact=True, lengths=lengths)

    @cached_property
    def steps(self) -> list[list[int]]:
        lengths, draw = json.loads(LENGTHS.read_text(encoding="utf-8"))["lengths"], Random(0)
        return [draw.sample(lengths, CONFIG.effective_batch_size) for _ in range(STEPS)]

    def counted(self, checkpointing: str, examples: int, length: int) -> float:
        """Seconds of a micro-batch by a dry run of it."""
        plan = replace(self.plan, checkpointing=checkpointing, offload=False, seq_len=length)
        run = measure_once(step_of(CONFIG, plan, CATALOG[self.model].shape, "train", examples))
        return speed(plan.gpu).seconds(run.flops, run.bytes_moved)

    @cached_property
    def work(self) -> dict[tuple[str, bool], np.ndarray]:
        """(checkpointing, padded) -> seconds per pass, per token and per pair of tokens."""
        fitted = {}
        for checkpointing in {
            "on",
            *(mode.checkpointing for mode in self.plan.modes),
            BEFORE[self.card][self.model][1],
        }:
            for padded, sizes in ((False, ALONE), (True, PADDED)):
                parts = [[1, n * length, n * length**2] for n, length in sizes]
                seconds = [self.counted(checkpointing, *size) for size in sizes]
                fitted[checkpointing, padded] = np.linalg.lstsq(np.array(parts, float), seconds, rcond=None)[0]
        return fitted

    def seconds(self, micro: Micro) -> float:
        checkpointing, examples, length = micro
        return float(self.work[checkpointing, examples > 1] @ [1, examples * length, examples * length**2])

    @property
    def error(self) -> float:
        """The largest of how much `seconds` differs from dry runs that it was not fitted to."""
        pairs = [(self.seconds(("on", *size)), self.counted("on", *size)) for size in CHECKED]
        return max(abs(told / counted - 1) for told, counted in pairs)

    def equal(self, size: int, checkpointing: str) -> list[Micro]:
        """The micro-batches of all steps, of equal size, their examples in random order."""
        groups = [step[start : start + size] for step in self.steps for start in range(0, len(step), size)]
        return [(checkpointing, size, max(group)) for group in groups]

    def by_tokens(self) -> list[Micro]:
        """The micro-batches of all steps, as the plan cuts them."""
        modes = self.plan.modes
        return [
            (modes[piece.mode].checkpointing, len(piece.examples), piece.longest)
            for step in self.steps
            for piece in cut(step, modes)
        ]

    def padding(self, micros: Iterable[Micro]) -> float:
        return 1 - sum(map(sum, self.steps)) / sum(examples * length for _, examples, length in micros)

    def table(self) -> dict[str, float]:
        """What the benchmark says of this card and model."""
        usual, before, ours = self.equal(*USUAL), self.equal(*BEFORE[self.card][self.model]), self.by_tokens()
        seconds = [sum(map(self.seconds, micros)) / STEPS for micros in (usual, before, ours)]
        return {
            "usual_seconds": seconds[0],
            "before_seconds": seconds[1],
            "seconds": seconds[2],
            "against_usual": seconds[0] / seconds[2],
            "against_before": seconds[1] / seconds[2],
            "padding_usual": self.padding(usual),
            "padding": self.padding(ours),
            "pieces": len(ours) / STEPS,
            "error": self.error,
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cards", nargs="*", default=list(BEFORE), metavar="CARD", help=", ".join(BEFORE))
    print("| card | model | 2 x 8, checkpointing | before | cut by tokens | against 2 x 8 | against before | padding |")
    print("|---|---|---|---|---|---|---|---|")
    found = []
    for card in parser.parse_args().cards:
        for model in BEFORE[card]:
            row = Row(card, model).table()
            found.append(row)
            print(
                f"| {card} | {model} | {row['usual_seconds']:.2f} s | {row['before_seconds']:.2f} s | {row['seconds']:.2f} s in "
                f"{row['pieces']:.1f} micro-batches | {row['against_usual']:.2f}x | {row['against_before']:.2f}x "
                f"| {row['padding']:.1%} instead of {row['padding_usual']:.1%} |",
                flush=True,
            )
    ratios = [row["against_usual"] for row in found]
    print(f"planned seconds against fixed 2x8 + checkpointing: median {median(ratios):.2f}x, least {min(ratios):.2f}x")
    print(f"against the plan before: least {min(row['against_before'] for row in found):.2f}x")
    print(
        f"padding: at most {max(row['padding'] for row in found):.1%}; counted work is told to {max(row['error'] for row in found):.1%}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

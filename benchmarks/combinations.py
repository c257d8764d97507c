"""Which kinds of training step do plans choose? Each of them is trained for two steps in tests/rehearsal/test_combinations.py.

    python -m benchmarks.combinations                   # plan every card x model x length anew, and write the list (an hour of dry runs)
    python -m benchmarks.combinations --share 1/2       # half of it, for one of two processes; `--join` then puts the halves together

The list carries a fingerprint of what planner and menu decide by the formula, so that a test can say when it is out of date.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

from helpers import planner
from helpers.config import TrainConfig
from helpers.dryrun import Peak, Step, measure
from helpers.hardware import AMPERE, KNOWN_GPUS, Gpu
from helpers.plan import Plan
from helpers.planner import DoesNotFit, make_plan
from helpers.registry import CATALOG

LIST = Path(__file__).parent / "data" / "combinations.json"
LENGTHS = (256, 512, 1024, 2048)
# The formula's choice is taken without a dry run where it would be the same on a card with a tenth less memory: it was never found
# further from the dry run than that, and what a dry run refuses is what the formula lets through.
NO_DOUBT = 0.9
Case = tuple[str, str, int]  # card, model, tokens


@dataclass(frozen=True)
class Combination:
    """What makes one training step another piece of code than the next."""

    dtype: str
    checkpointing: str
    offload: bool
    loss_head: str
    masked: bool

    @classmethod
    def of(cls, plan: Plan) -> Combination:
        return cls(plan.dtype, plan.checkpointing, plan.offload, plan.loss_head, plan.micro_batch > 1)

    def with_the_other_head(self) -> Combination:
        """Before training, a probe finds out whether Triton works; the plan's guess may be wrong either way."""
        return replace(self, loss_head="torch" if self.loss_head == "triton" else "triton")


def cases() -> list[Case]:
    """Every card x model x length, in the order in which a dry run needs to build fewest models."""
    kinds = sorted(KNOWN_GPUS, key=lambda card: KNOWN_GPUS[card].capability >= AMPERE)
    return [(card, model, length) for model in CATALOG for length in LENGTHS for card in kinds]


def fingerprint() -> str:
    """SHA-256 of what planner and menu decide for all cases by the formula: settings, peak, or that nothing fits."""
    digest = hashlib.sha256()
    for card, model, length in sorted(cases()):
        try:
            plan = make_plan(TrainConfig(max_length=length), KNOWN_GPUS[card], CATALOG[model], exact=False)
            decided = (asdict(Combination.of(plan)), plan.micro_batch, plan.seq_len, plan.loss_tile, plan.peak_bytes)
        except DoesNotFit:
            decided = None
        digest.update(json.dumps([card, model, length, decided]).encode())
    return digest.hexdigest()


def seeded_cases(number: int, seed: str) -> list[Case]:
    """`number` cases, others for another seed, in the order of `cases`."""
    everything = cases()
    return sorted(random.Random(seed).sample(everything, number), key=everything.index)


def _by_formula(gpu: Gpu, model: str, length: int) -> Plan:
    return make_plan(TrainConfig(max_length=length), gpu, CATALOG[model], exact=False)


def _choice(plan: Plan) -> tuple[Any, ...]:
    return Combination.of(plan), plan.micro_batch, plan.seq_len


def chosen(of: Iterable[Case], exact: bool = False) -> Iterator[tuple[Case, Combination | None]]:
    """Each case with the combination that its exact plan chooses; None where nothing fits.

    A step is dry-run once, for all cards; with `exact`, also where the formula leaves no doubt.
    """
    known: dict[str, Peak] = {}

    def once(step: Step) -> Peak:
        key = json.dumps(asdict(step), sort_keys=True)
        if key not in known:
            known[key] = measure(step)
        return known[key]

    # Batches for evaluation and generation are no part of a combination.
    with (
        patch.object(planner, "measure", once),
        patch.object(planner, "_plan_evaluation_and_generation", lambda _c, plan, _s, _e: plan),
    ):
        for card, model, length in of:
            try:
                plan = _by_formula(KNOWN_GPUS[card], model, length)
                less = replace(KNOWN_GPUS[card], free_bytes=int(NO_DOUBT * KNOWN_GPUS[card].free_bytes))
                if not exact and _choice(plan) == _choice(_by_formula(less, model, length)):
                    yield (card, model, length), Combination.of(plan)
                    continue
            except DoesNotFit:
                pass  # by the formula, or with less memory: the exact plan says what does
            try:
                plan = make_plan(TrainConfig(max_length=length), KNOWN_GPUS[card], CATALOG[model])
                yield (card, model, length), Combination.of(plan)
            except DoesNotFit:
                yield (card, model, length), None


@cache
def recorded() -> tuple[str, list[Combination]]:
    """(fingerprint, combinations) of the committed list."""
    record = json.loads(LIST.read_text(encoding="utf-8"))
    fields = Combination.__dataclass_fields__
    return record["fingerprint"], [
        Combination(**{name: row[name] for name in fields}) for row in record["combinations"]
    ]


def write(found: list[tuple[Case, Combination | None]]) -> None:
    """The list, each combination with how many plans choose it and one of them."""
    rows = []
    for combination in sorted({c for _, c in found if c is not None}, key=lambda c: list(map(str, asdict(c).values()))):
        where = [case for case, c in found if c == combination]
        rows.append(asdict(combination) | {"plans": len(where), "for example": "{}, {}, {} tokens".format(*where[0])})
    record = {
        "fingerprint": fingerprint(),
        "cases": len(found),
        "fitting": sum(c is not None for _, c in found),
        "combinations": rows,
    }
    LIST.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"{len(found)} cases, {record['fitting']} fit, {len(rows)} combinations: {LIST}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--share", default="1/1", help="which part of the menu to plan, e.g. 2/3")
    parser.add_argument("--join", nargs="+", type=Path, help="files that --share wrote, to be put together")
    arguments = parser.parse_args()
    if arguments.join:
        parts = [json.loads(line) for file in arguments.join for line in file.read_text(encoding="utf-8").splitlines()]
        found = [(tuple(case), Combination(**settings) if settings else None) for case, settings in parts]
        if missing := set(cases()) - {case for case, _ in found}:
            parser.error(f"{len(missing)} cases are in none of these files, {sorted(missing)[0]} for example")
        write(found)
        return 0
    part, parts = map(int, arguments.share.split("/"))
    mine, began, found = [case for case in cases() if list(CATALOG).index(case[1]) % parts == part - 1], time.time(), []
    for number, (case, combination) in enumerate(chosen(mine), start=1):
        found.append((case, combination))
        if parts > 1:
            print(json.dumps([case, combination and asdict(combination)]), flush=True)
        print(f"{number} of {len(mine)}, {(time.time() - began) / 60:.0f} min: {case}", file=sys.stderr)
    if parts == 1:
        write(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())

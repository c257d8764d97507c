"""Write the table of times and memory at the top of each lesson: what a CPU took, and what the planner says of two cards.

    make notebooks                          # measures the CPU's figures
    python -m tools.lesson_tables --record  # keeps them, with the planner's, in benchmarks/data/lessons_measured.json
    python -m tools.lesson_tables           # from that file into the lessons; then: make worksheets
    python -m tools.lesson_tables --check   # exit status 1 if a lesson's table is not what the file says

The settings are the lesson's own: its config cell is run as it would be on that card. The quickstart keeps its line for a CPU, which
tests/test_quickstart.py holds to be true.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

from helpers.config import TrainConfig
from helpers.data import load_examples, split
from helpers.hardware import GIB, KNOWN_GPUS, Gpu
from helpers.memory import CUDA_CONTEXT
from helpers.menu import choose_model
from helpers.planner import make_plan
from helpers.recipe import total_steps
from helpers.registry import find_shape
from tools import course

RECORD = course.ROOT / "benchmarks" / "data" / "lessons_measured.json"
MEASURED = course.ROOT / "runs" / "notebooks" / "course.json"  # by tools.run_course
CARDS = {"T4": "Colab T4", "RTX 4060": "RTX 4060, 8 GB"}
TRAININGS = {
    "00": 1,
    "03": 2,
    "04": 1,
    "05": 1,
    "06": 1,
    "07": 1,
}  # calls of `train` with the lesson's config; 02 has a loop of its own
LOADS_16_BIT = ("01", "06")  # lessons that put the unquantized model onto the card as well
FINDS_A_RUN = {"05": "04", "06": "04"}  # lesson -> the one that leaves its run
QUICKSTART_CPU = "| no GPU: SmolLM2, 135M parameters | about 10 minutes on 2 cores | 4 GB of RAM |"


def config_on(lesson: Path, gpu: Gpu) -> TrainConfig:
    """The lesson's config, as its own cell makes it on that card."""
    cell = next(cell for cell in course.code_cells(course.read(lesson)) if "config = TrainConfig(" in cell.source)
    names: dict[str, Any] = {}
    with patch("helpers.hardware.detect_gpu", lambda: gpu), patch("builtins.print"):
        exec(cell.source, names)
    return names["config"]


def planned(lesson: Path, gpu: Gpu) -> dict[str, Any]:
    """The model that the kit takes on that card, the peak on it in GiB, and the minutes of training if every example were as long as may be."""
    config = config_on(lesson, gpu)
    model, _ = choose_model(config, gpu, hub_reachable=True)
    plan = make_plan(config, gpu, model)
    number = lesson.name[:2]
    peak = plan.peak_bytes
    if number in LOADS_16_BIT:
        whole = 2 * find_shape(model).parameters() + CUDA_CONTEXT
        peak = whole if number not in TRAININGS else max(peak, whole)
    training, _ = split(load_examples(config.data, rejected=None), config.validation_share, config.seed)
    seconds = plan.seconds_per_step and plan.seconds_per_step * total_steps(config, len(training)) * TRAININGS.get(
        number, 0
    )
    return {
        "model": model.rpartition("/")[2],
        "peak_gib": round(peak / GIB, 1),
        "training_minutes": seconds and round(seconds / 60, 1),
    }


def record() -> dict[str, Any]:
    """Everything that the tables say: measured by the last `make notebooks`, planned now."""
    if not MEASURED.is_file():
        sys.exit(f"{MEASURED} is not there: run `make notebooks` first.")
    runs = {row["name"]: row for row in json.loads(MEASURED.read_text(encoding="utf-8"))["notebooks"]}
    found: dict[str, Any] = {}
    for lesson in course.lessons():
        found[lesson.stem] = {card: planned(lesson, KNOWN_GPUS[card]) for card in CARDS}
        if lesson.stem in runs:
            found[lesson.stem]["CPU"] = {
                "seconds": runs[lesson.stem]["seconds"],
                "peak_gib": runs[lesson.stem]["peak_gib"],
            }
    return found


def table(stem: str, recorded: dict[str, Any]) -> str:
    """The Markdown table of one lesson."""
    own = recorded[stem]
    rows = ["| machine | time | memory |", "|---|---|---|", cpu_row(stem, recorded)]
    for card, name in CARDS.items():
        plan = own[card]
        minutes = plan["training_minutes"]
        if stem[:2] not in TRAININGS:
            time = "not yet measured"
        elif minutes is None:
            time = "not known for this card"
        else:
            time = f"training at most {_minutes(60 * minutes)}"
        rows.append(
            f"| {name} ({plan['model']}): by the planner, not yet measured | {time} | {plan['peak_gib']:.1f} GiB of the card |"
        )
    return "\n".join(rows)


def cpu_row(stem: str, recorded: dict[str, Any]) -> str:
    if stem.startswith("00"):
        return QUICKSTART_CPU
    cpu = recorded[stem]["CPU"]
    time = f"about {_minutes(cpu['seconds'])} on one core"
    if stem[:2] in FINDS_A_RUN:
        time += f", if notebook {FINDS_A_RUN[stem[:2]]} has left its run"
    return f"| no GPU: SmolLM2, 135M parameters | {time} | {math.ceil(2 * cpu['peak_gib']) / 2:g} GB of RAM |"


def _minutes(seconds: float) -> str:
    whole = max(1, math.ceil(seconds / 60))
    return "1 minute" if whole == 1 else f"{whole} minutes"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--record", action="store_true", help=f"measure and plan anew, into {RECORD.relative_to(course.ROOT)}"
    )
    parser.add_argument("--check", action="store_true", help="write nothing, and say what is not current")
    chosen = parser.parse_args(arguments)
    if chosen.record:
        RECORD.write_text(json.dumps(record(), indent=1) + "\n", encoding="utf-8")
    recorded, stale = json.loads(RECORD.read_text(encoding="utf-8")), []
    for lesson in course.lessons():
        notebook = course.read(lesson)
        first = notebook.cells[0]
        fresh = course.TABLE.sub(lambda _, stem=lesson.stem: table(stem, recorded), first.source)
        if fresh != first.source:
            stale.append(lesson.name)
            first.source = fresh
            if not chosen.check:
                lesson.write_text(course.text(notebook), encoding="utf-8")
    if stale:
        print(f"{'Not current' if chosen.check else 'Written'}: {', '.join(stale)}")
    return 1 if chosen.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())

"""Do the plans hold on a real CUDA card? Trains real-shape models with random weights on the plans, and measures.

    python -m benchmarks.gpu bf16                  # one step; all of them, in the order that tells most first:
    python -m benchmarks.gpu all --minutes 25
    python -m benchmarks.gpu fp16 --models Llama-3.2-1B-Instruct --limits 14.56 --steps 50
    python -m benchmarks.gpu_report                # what was measured, as the table in README (`make gpu-report`)

    probe      the dry run's context, Triton, memory outside PyTorch, a model loaded from files, and what releasing it gives back
    bf16       plans for cards of 8 and 12 GiB, examples of unequal lengths: memory and seconds of training, evaluation, generation
    fp16       the same as on a T4: planned for 14.56 GiB, gradient scaler, memory-efficient attention, 50 steps
    oom        capped below what the plan needs: is the step done again with the same loss? Then offloading
    resume     selective checkpointing; a checkpoint made in fp16 continued in fp16 and in bf16
    generate   generation with 8 and 48 prompts at a time
    plain      a plan without expandable segments, as on Windows

Each case is planned for a card of so many GiB, runs in a process of its own that `set_per_process_memory_fraction` holds to that size,
and has its own time-out. What it measured, or how it failed, is one line in benchmarks/data/gpu_measured.jsonl at once, so an
interrupted run loses one case. Nothing is downloaded. A step takes less than ten minutes; cases for which no time is left are named.

On Hopper (H100, H200), PyTorch chooses other kernels, with larger workspaces, than on the cards that the plans are for. For numbers
that say something about those, set before the start:

    TORCH_CUDNN_SDPA_DEPRIORITIZED=1 CUBLAS_WORKSPACE_CONFIG=:4096:2:16:8
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from helpers.hardware import EXPANDABLE, growing_segments
from helpers.registry import CATALOG

ROOT = Path(__file__).resolve().parent.parent
RECORD = Path(__file__).parent / "data" / "gpu_measured.jsonl"
CHILD = [sys.executable, "-m", "benchmarks.gpu_cases"]  # and after it: a case as JSON, the file for its result
SMALLEST, SMALL, MIDDLE, LARGE = (
    "SmolLM2-360M-Instruct",
    "Llama-3.2-1B-Instruct",
    "Llama-3.2-3B-Instruct",
    "Llama-3.1-8B-Instruct",
)
EFFECTIVE_BATCH = 8  # examples per optimizer step
STEP_SECONDS = 570  # of one step, so that the command ends within ten minutes
SHORTEST_CASE = 30  # seconds: with less time than this, a case is not begun
ERROR_LINES = 15  # of stderr, kept in the record
# A traceback's path without its beginning: where things are installed is nobody's business.
SHORT_PATH = re.compile(r'File "(?:[^"]*[/\\])?((?:[^/\\"]+[/\\]){2}[^/\\"]+)"')


@dataclass(frozen=True)
class Case:
    """One measurement, in one process."""

    step: str
    """The command that it belongs to."""
    kind: str
    """The function of `benchmarks.gpu_cases` that does it."""
    model: str
    gib: float
    """GiB that the card is planned to have free, and that the process is held to."""
    steps: int = 5
    """Optimizer steps. The first two are not counted in the seconds."""
    fp16: bool = False
    """As a T4: planned for compute capability 7.5, so fp16 with a gradient scaler, and no flash attention."""
    max_length: int = 1024
    expandable: bool = True
    head: str = ""
    """Loss head that is taken as found: "torch" where Triton works is what a card without it does. Empty: tried."""
    forced: dict[str, Any] = field(default_factory=dict)
    """Settings of the plan that are changed after planning, such as {"checkpointing": "selective"}."""
    batches: tuple[int, ...] = ()
    """Prompts at a time, for generation."""

    def __str__(self) -> str:
        traits = (
            ["fp16"] * self.fp16 + ["plain segments"] * (not self.expandable) + [f"{self.head} head"] * bool(self.head)
        )
        traits += [f"{name} {value}" for name, value in self.forced.items()]
        return f"{self.step:<9}{self.kind:<10}{self.model:<24}{self.gib:>6} GiB  {', '.join(traits)}".rstrip()


# ---------------------------------------------------------------------------------------------------- what is measured


def probe(limits: list[float], models: list[str], steps: int) -> list[Case]:
    return [Case("probe", "probe", (models or [SMALLEST])[0], (limits or [8])[0], steps or 3)]


def bf16(limits: list[float], models: list[str], steps: int) -> list[Case]:
    return [
        Case("bf16", "training", model, gib, steps or 5)
        for gib in limits or [8, 12]
        for model in models or [SMALL, MIDDLE, LARGE]
    ]


def fp16(limits: list[float], models: list[str], steps: int) -> list[Case]:
    whole = [
        Case("fp16", "training", model, gib, steps or 50, fp16=True)
        for gib in limits or [14.56]
        for model in models or [SMALL, LARGE]
    ]
    return [*whole, Case("fp16", "training", whole[0].model, whole[0].gib, min(5, steps or 5), fp16=True, head="torch")]


def oom(limits: list[float], models: list[str], steps: int) -> list[Case]:
    gib = (limits or [12])[0]
    one_at_a_time = {
        "micro_batch": 1,
        "accumulation": EFFECTIVE_BATCH,
        "eval_batch": 1,
        "checkpointing": "on",
        "offload": False,
    }
    return [
        Case("oom", "replay", (models or [SMALL])[0], gib, steps or 4),
        Case("oom", "offload", (models or [LARGE])[-1], gib, steps or 4, max_length=2048, forced=one_at_a_time),
    ]


def resume(limits: list[float], models: list[str], steps: int) -> list[Case]:
    selective = {"checkpointing": "selective"}
    return [
        Case(
            "resume", "resume", (models or [SMALL])[0], (limits or [14.56])[0], steps or 6, fp16=True, forced=selective
        )
    ]


def generate(limits: list[float], models: list[str], steps: int) -> list[Case]:
    return [
        Case("generate", "generate", model, (limits or [12])[0], batches=(8, 48)) for model in models or [SMALL, LARGE]
    ]


def plain(limits: list[float], models: list[str], steps: int) -> list[Case]:
    return [Case("plain", "training", (models or [MIDDLE])[0], (limits or [8])[0], steps or 5, expandable=False)]


STEPS: dict[str, Callable[[list[float], list[str], int], list[Case]]] = {
    step.__name__: step for step in (probe, bf16, fp16, oom, resume, generate, plain)
}


# --------------------------------------------------------------------------------------------------------- one case


def run_case(case: Case, seconds: float) -> dict[str, Any]:
    """Run `case` in a process of its own. What it had written before it failed or ran out of time is kept, with `error` beside it."""
    began, error = time.perf_counter(), ""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        # `helpers` switches expandable segments on where nothing is said about the allocator, so it is said here.
        segments = EXPANDABLE if case.expandable and growing_segments() else "expandable_segments:False"
        environment = os.environ | {"PYTORCH_ALLOC_CONF": segments, "HF_HUB_OFFLINE": "1", "TMPDIR": folder}
        try:
            done = subprocess.run(
                [*CHILD, json.dumps(asdict(case)), str(file)],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=seconds,
            )
            if done.returncode:
                lines = done.stderr.strip().splitlines()[-ERROR_LINES:]
                error = SHORT_PATH.sub(r'File "\1"', "\n".join(lines)) or f"ended with exit status {done.returncode}"
        except subprocess.TimeoutExpired:
            error = f"timed out after {seconds:.0f} s"
        result = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    head = {
        "date": datetime.date.today().isoformat(),
        **asdict(case),
        "case_seconds": round(time.perf_counter() - began, 1),
    }
    return head | result | ({"error": error} if error else {})


def run_step(name: str, cases: list[Case], timeout: float, seconds: float) -> int:
    """Run and record the cases of one step, for at most `seconds`; the number of cases that failed."""
    ends, failures = time.monotonic() + seconds, 0
    for case in cases:
        left = ends - time.monotonic()
        if left < min(SHORTEST_CASE, timeout):
            print(f"{case}: skipped, no time is left", flush=True)
            continue
        result = run_case(case, min(timeout, left))
        RECORD.parent.mkdir(parents=True, exist_ok=True)
        with RECORD.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
        failures += "error" in result
        print(f"{case}  {result['case_seconds']:.0f} s: {in_words(result)}", flush=True)
    return failures


def in_words(result: dict[str, Any]) -> str:
    """The outcome of one case in one line."""
    for reason in ("error", "does_not_fit", "skipped"):
        if reason in result:
            return f"{reason.replace('_', ' ')}: {result[reason].splitlines()[-1][:200]}"
    words = []
    for name, value in result.get("runs", {}).items():
        words.append(
            f"{name}: predicted {value['predicted_reserved_mib']:.0f}, measured {value['measured_reserved_mib']:.0f} MiB reserved"
        )
    return "; ".join(words) or "done"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=[*STEPS, "all"], nargs="?", default="all")
    parser.add_argument("--limits", nargs="+", type=float, default=[], help="GiB of the cards that are planned for")
    parser.add_argument(
        "--models", nargs="+", choices=list(CATALOG), default=[], metavar="MODEL", help="names from the menu"
    )
    parser.add_argument("--steps", type=int, default=0, help="optimizer steps of each training")
    parser.add_argument("--timeout", type=float, default=240, help="seconds that one case may take")
    parser.add_argument("--minutes", type=float, default=25, help="that all steps together may take")
    asked = parser.parse_args(arguments)
    if not card_is_there():
        print("no CUDA card here: nothing to measure")
        return 0
    ends, failures = time.monotonic() + 60 * asked.minutes, 0
    for name in STEPS if asked.step == "all" else [asked.step]:
        cases = STEPS[name](asked.limits, asked.models, asked.steps)
        failures += run_step(name, cases, asked.timeout, min(STEP_SECONDS, ends - time.monotonic()))
    print("no case failed" if not failures else f"{failures} cases failed; {RECORD.name} says how")
    return failures


def card_is_there() -> bool:
    """Asked without making a context, which would take memory on the card from the cases."""
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    sys.exit(main())

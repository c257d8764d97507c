"""What the quickstart trains without a GPU, to the digit: plan, split, token ids and losses, so that a rebuild can be shown to change nothing.

    make quickstart && python -m tests.golden --record     # when a change is meant to change them

Losses depend a little on the CPU (the order of its sums): where another kind of CPU recorded them, they are compared loosely.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from helpers.config import TrainConfig
from helpers.data import load_examples, split
from helpers.data.tokens import load_tokenizer, tokenize
from helpers.runs import Run

ROOT = Path(__file__).parent.parent
RECORD = ROOT / "tests" / "golden.json"
PLAN = (
    "dtype",
    "optimizer",
    "seq_len",
    "micro_batch",
    "accumulation",
    "checkpointing",
    "offload",
    "eval_batch",
    "loss_head",
)
EXACT, LOOSE = 1e-6, 2e-2  # of a loss, on the same kind of CPU and on another


def cpu() -> str:
    """What decides in which order a CPU adds up: its instructions, PyTorch, and the number of threads."""
    return f"{torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}, {torch.get_num_threads()} threads"


def golden(folder: Path) -> dict[str, Any]:
    """The figures of the run in `folder`."""
    run, settings = Run.load(folder), TrainConfig()
    training, validation = split(load_examples(ROOT / settings.data), settings.validation_share, settings.seed)
    ids = [list(example[0]) for example in tokenize(training, load_tokenizer(run.settings["model"]))]
    losses = {key: [[e["step"], e[key]] for e in run.history if key in e] for key in ("loss", "eval_loss")}
    return {
        "cpu": cpu(),
        "plan": {name: run.plan[name] for name in PLAN},
        "peak_bytes": run.plan["peak_bytes"],
        "split": [run.settings["data_sha256"], len(training), len(validation)],
        "token_ids": hashlib.sha256(json.dumps(ids).encode()).hexdigest(),
        **losses,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true", help=f"write {RECORD.relative_to(ROOT)}")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "quickstart")
    chosen = parser.parse_args()
    text = json.dumps(golden(chosen.folder), indent=1)
    print(RECORD.write_text(text + "\n", encoding="utf-8") if chosen.record else text)

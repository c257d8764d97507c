"""The exact memory peak of a training step, with no GPU and no weights.

    result = dry_run(Step(model=shape.to_config(), micro_batch=4, seq_len=1024))
    result.allocated, result.reserved           # bytes

The real model class, bitsandbytes layers, PEFT adapters, TRL's loss head and the optimizer run on the meta device in a worker
process, because that patches global functions and fills caches; the caller's process stays clean. The worker stays alive, so the
second question costs seconds less than the first.

    python -m helpers.dryrun rows.csv           # check us against your own card: see `main`
"""

from __future__ import annotations

import argparse
import atexit
import csv
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from helpers.memory import MIB

FAMILY_BY_NAME = {
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "mistral": "mistral",
    "gemma-2": "gemma2",
    "smollm3": "smollm3",
    "phi-3": "phi3",
}


class DryRunError(RuntimeError):
    """The step could not be built or run. The message is the worker's."""


@dataclass(frozen=True)
class Step:
    """One training step (or evaluation, or generation), described in plain values."""

    model: dict[str, Any]
    """A `transformers` configuration as a dict, with `model_type`."""
    micro_batch: int
    seq_len: int
    phase: str = "train"
    """"train", "evaluate" (loss only), or "generate" (the prompt is read, keys and values are kept)."""
    r: int = 16
    target_modules: str | list[str] = "all-linear"
    lora_dropout: float = 0.0
    adapter_dtype: str = "float32"
    quantization: str = "nf4"
    double_quant: bool = True
    dtype: str = "bfloat16"
    checkpointing: str = "on"
    """"off", "selective" (keeps attention's output), "on", or "reentrant" (PyTorch's older variant of "on")."""
    offload: bool = False
    """Saved activations wait in host memory."""
    attention: str = "flash"
    """"flash", "efficient", "math" or "eager": what the card will really run."""
    masked: bool = False
    """True where examples of different lengths are padded, so that attention gets a mask: no flash attention, and keys repeated."""
    loss_head: str = "triton"
    """TRL's tiled head with Triton kernels, the same in plain "torch", or "full" logits as transformers computes them."""
    loss_tile: int = 32768
    """Vocabulary entries per tile of TRL's head."""
    autocast: bool = True
    """As Trainer does with fp16 and bf16: fp32 adapters are cast to `dtype` for each multiplication."""
    optimizer: str = "adamw_8bit"
    fp32_upcast: bool = False
    """Did `prepare_model_for_kbit_training` turn embeddings, head and norms into fp32?"""
    expandable: bool = False
    """Does the allocator work with segments that grow? Decides `reserved`."""
    load_in: str = ""
    """Where the weights are loaded and quantised on the card, the dtype they arrive in; leaves its marks on `reserved`."""
    device: str = "meta"
    """"cpu" runs the step for real, to check the tracker against it."""


@dataclass(frozen=True)
class DryRun:
    """What a step needs. Bytes, operations and seconds."""

    allocated: int
    """Peak of `torch.cuda.max_memory_allocated()`."""
    reserved: int
    """Peak of `torch.cuda.max_memory_reserved()`, by replaying the allocations."""
    live_peak: int
    """Peak bytes of live tensors, without the allocator's rounding and without library workspaces."""
    resident: int
    """Bytes that stay between steps: weights, adapters, optimizer."""
    host: int
    """Bytes of activations that waited in host memory."""
    flops: int
    bytes_moved: int
    seconds: float
    peak_operation: str = field(default="", compare=False)


class Worker:
    """The process in which dry runs happen: started at the first question, ended with this process. One question at a time."""

    def __init__(self) -> None:
        self._process: subprocess.Popen | None = None
        self._missing: list[str] = []

    def missing_names(self) -> list[str]:
        """What the process misses in TRL (`helpers.compat.missing_names`): the first thing that it says."""
        if self._process is None or self._process.poll() is not None:
            root = Path(__file__).resolve().parent.parent
            no_card = os.environ | {
                "CUDA_VISIBLE_DEVICES": ""
            }  # importing bitsandbytes would else take a context on the card
            self._process = subprocess.Popen(
                [sys.executable, "-m", "helpers.dryrun_worker"],
                cwd=root,
                text=True,
                encoding="utf-8",
                env=no_card,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            self._missing = self._answer()["missing"]
        return self._missing

    def ask(self, step: Step) -> DryRun:
        self.missing_names()
        return DryRun(**self._answer(asdict(step)))

    def _answer(self, question: dict[str, Any] | None = None) -> dict[str, Any]:
        try:
            if question is not None:
                print(json.dumps(question), file=self._process.stdin, flush=True)
            answer = self._process.stdout.readline()
        except BaseException:  # an interrupted question must not be answered to the next one who asks
            self.stop()
            raise
        if not answer:
            self.stop()
            raise DryRunError(
                "the dry run's process ended unexpectedly, perhaps for lack of memory; try again, or a smaller model"
            )
        result = json.loads(answer)
        if "error" in result:
            raise DryRunError(result["error"])
        return result

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


_worker = Worker()
atexit.register(_worker.stop)


def dry_run(step: Step) -> DryRun:
    """Run `step` without a GPU and without weights.

    Raises:
        DryRunError: the configuration is not a causal language model, or cannot be built.
    """
    return _worker.ask(step)


def missing_names() -> list[str]:
    """Names of TRL that the dry run needs in order to follow its loss head, and that this version does not have."""
    return _worker.missing_names()


# --------------------------------------------------------------------------------------- the check against real cards


def step_from_row(row: dict[str, str]) -> Step:
    """A line of a CSV with measured steps, as a `Step`. Columns that are absent mean the recipe of the recorded T4 runs."""

    def flag(name: str, default: bool) -> bool:
        return row[name].strip().lower() in ("true", "1", "yes") if row.get(name) else default

    name = row["model"].lower()
    family = row.get("model_type") or next((kind for part, kind in FAMILY_BY_NAME.items() if part in name), "llama")
    integers = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "vocab_size",
    )
    model = {
        "model_type": family,
        "tie_word_embeddings": flag("tie_word_embeddings", False),
        "max_position_embeddings": 32768,
    }
    model |= {key: int(row[key]) for key in integers}
    quantized = row["base_weights"] == "nf4"
    return Step(
        model=model,
        micro_batch=int(row["batch_size"]),
        seq_len=int(row["seq_len"]),
        r=int(row["lora_rank"]),
        target_modules=row["lora_targets"] if row["lora_targets"] == "all-linear" else row["lora_targets"].split("+"),
        adapter_dtype=row.get("adapter_dtype") or "float32",
        quantization="nf4" if quantized else "none",
        double_quant=flag("double_quant", False),
        dtype=row["compute_dtype"],
        checkpointing="on" if flag("gradient_checkpointing", True) else "off",
        attention=row["attention"].removeprefix("sdpa-"),
        loss_head=row.get("loss_head") or "full",
        optimizer="adamw_torch" if row["optimizer"].startswith("adamw_torch") else "adamw_8bit",
        fp32_upcast=flag("fp32_upcast", quantized),
        load_in=row["compute_dtype"],
        autocast=False,
    )


def main() -> int:
    """Print a CSV of measured steps with our predictions added, and how far off they are.

    The columns are those of benchmarks/data/t4_measured.csv; `model_type`, `loss_head`, `fp32_upcast` and `adapter_dtype` may be
    added. Without them the recipe of that file is meant: full logits, fp32 upcast for nf4 rows, fp32 adapters, family by name.
    """
    parser = argparse.ArgumentParser(description=main.__doc__.splitlines()[0])
    parser.add_argument("rows", type=Path, help="CSV file with measured steps")
    path = parser.parse_args().rows
    if not path.is_file():
        parser.error(f"no file at {path.resolve()}")
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        parser.error(f"{path} has no rows")

    errors: dict[str, list[float]] = {"allocated": [], "reserved": []}
    writer = csv.DictWriter(
        sys.stdout, [*rows[0], "predicted_allocated_mib", "predicted_reserved_mib"], lineterminator="\n"
    )
    writer.writeheader()
    for number, row in enumerate(rows, start=2):
        try:
            result = dry_run(step_from_row(row))
        except (KeyError, ValueError, DryRunError) as error:
            parser.error(
                f"{path}, line {number}: {type(error).__name__} {error}; the columns are those of benchmarks/data/t4_measured.csv"
            )
        for kind in errors:
            predicted = getattr(result, kind) / MIB
            row[f"predicted_{kind}_mib"] = f"{predicted:.1f}"
            if row.get(f"measured_peak_{kind}_mib"):
                errors[kind].append(predicted / float(row[f"measured_peak_{kind}_mib"]) - 1)
        writer.writerow(row)
        sys.stdout.flush()
    for kind, values in errors.items():
        if values:
            mean, worst = sum(map(abs, values)) / len(values), max(values, key=abs)
            print(f"{kind}: mean {mean:.2%}, worst {worst:+.2%}".replace("%", " %"))
        else:
            print(f"{kind}: nothing measured to compare with")
    return 0


if __name__ == "__main__":
    sys.exit(main())

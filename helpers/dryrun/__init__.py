"""The exact memory peak of a training step, with no GPU and no weights.

    peak = measure(Step(model=shape.to_config(), micro_batch=4, seq_len=1024))
    peak.allocated, peak.reserved           # bytes

The real model class, bitsandbytes layers, PEFT adapters, TRL's loss head and the optimizer run on PyTorch's meta device, in a worker
process: that patches global functions and fills caches, and the caller's process stays clean. The worker stays alive, so the second
question costs seconds less than the first.

    python -m benchmarks.memory_rows rows.csv           # check us against your own card
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from helpers.files import atomic_write
from helpers.hub import cache_folder

LIBRARIES = ("torch", "transformers", "trl", "bitsandbytes", "peft")
SOURCES = [
    file
    for name in ("dryrun/*", "compat", "hardware", "memory")
    for file in Path(__file__).parents[1].glob(f"{name}.py")
]


class DryRunError(RuntimeError):
    """The step could not be built or run. The message is the worker's."""


@dataclass(frozen=True)
class Step:
    """One training step (or evaluation, or generation), described in plain values."""

    model: dict[str, Any]  # a `transformers` configuration, with `model_type`
    micro_batch: int
    seq_len: int
    phase: str = "train"  # or "evaluate" (loss only), or "generate" (the prompt is read, keys and values are kept)
    r: int = 16
    target_modules: str | list[str] = "all-linear"
    lora_dropout: float = 0.0
    adapter_dtype: str = "float32"
    quantization: str = "nf4"  # or "none"
    double_quant: bool = True
    dtype: str = "bfloat16"
    checkpointing: str = "on"  # "off", "selective" (keeps attention's output), "on", or "reentrant" (the older "on")
    offload: bool = False  # saved activations wait in host memory
    accumulating: bool = False  # gradients of the optimizer step's earlier micro-batches are there
    attention: str = "flash"  # "flash", "efficient", "math" or "eager": what the card will really run
    masked: bool = False  # examples are padded, so attention gets a mask: no flash attention, and keys repeated
    loss_head: str = "triton"  # TRL's tiled head with Triton, the same in plain "torch", or "full" logits
    loss_tile: int = 32768  # vocabulary entries per tile of TRL's head
    autocast: bool = True  # Trainer's, with fp16 and bf16: fp32 adapters are cast to `dtype` for each multiplication
    optimizer: str = "adamw_8bit"  # or "adamw_torch"
    fp32_upcast: bool = False  # embeddings, head and norms in fp32, as `prepare_model_for_kbit_training` has it
    expandable: bool = False  # does the allocator work with segments that grow? Decides `reserved`
    load_in: str = ""  # dtype in which weights arrive, if they are quantized on the card; leaves marks on `reserved`
    device: str = "meta"  # "cpu" runs the step for real, to check the dry run against it


@dataclass(frozen=True)
class Peak:
    """What a step needs. Sizes in bytes."""

    allocated: int  # peak of `torch.cuda.max_memory_allocated()`
    reserved: int  # peak of `torch.cuda.max_memory_reserved()`
    live_peak: int  # of live tensors, without the allocator's rounding and without library workspaces
    resident: int  # stays between steps: weights, adapters, optimizer
    flops: int
    bytes_moved: int


class Worker:
    """The process in which dry runs happen: started at the first question, ended with this process. One question at a time."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def ask(self, question: dict[str, Any] | None) -> dict[str, Any]:
        """The answer to one question: the fields of a `Step`, or None for what is missing in TRL."""
        if self._process is None or self._process.poll() is not None:
            self._process = start()
        process = self._process
        assert process.stdout is not None  # it is a pipe
        try:
            print(json.dumps(question), file=process.stdin, flush=True)
            answer = process.stdout.readline()
        except BaseException:  # an interrupted question must not be answered to the next one who asks
            self.stop()
            raise
        if not answer:
            self.stop()
            raise DryRunError("the dry run's process ended, perhaps for lack of memory; try again, or a smaller model")
        result = json.loads(answer)
        if "error" in result:
            raise DryRunError(result["error"])
        return result

    def stop(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def start() -> subprocess.Popen[str]:
    """A new process of `helpers.dryrun.worker`. It sees no card: importing bitsandbytes would take a context on it."""
    return subprocess.Popen(
        [sys.executable, "-m", "helpers.dryrun.worker"],
        cwd=Path(__file__).resolve().parents[2],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        encoding="utf-8",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )


_worker = Worker()
atexit.register(_worker.stop)


def measure(step: Step) -> Peak:
    """Run `step` without a GPU and without weights.

    Raises:
        DryRunError: the configuration is not a causal language model, or cannot be built.
    """
    return Peak(**_worker.ask(asdict(step)))


def measure_once(step: Step) -> Peak:
    """`measure`, and remember the answer on disk for as long as the code that was run stays the same."""
    what = [asdict(step), [*map(version, LIBRARIES)], *(file.read_text("utf-8") for file in sorted(SOURCES))]
    file = cache_folder() / "dry_runs" / f"{hashlib.sha256(json.dumps(what).encode()).hexdigest()}.json"
    with contextlib.suppress(OSError, ValueError, TypeError):  # not there, or not whole
        return Peak(**json.loads(file.read_text("utf-8")))
    peak = measure(step)
    with contextlib.suppress(OSError):  # no room, or not ours to write
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(file, json.dumps(asdict(peak)))
    return peak


def missing_names() -> list[str]:
    """Names of TRL that the dry run needs in order to follow its loss head, and that this version does not have."""
    return _worker.ask(None)["missing"]

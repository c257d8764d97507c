"""The exact memory peak of a training step, with no GPU and no weights.

    result = dry_run(Step(model=shape.to_config(), micro_batch=4, seq_len=1024))
    result.allocated, result.reserved           # bytes

The real model class, bitsandbytes layers, PEFT adapters, TRL's loss head and the optimizer run on the meta device in a worker
process, because that patches global functions and fills caches; the caller's process stays clean. The worker stays alive, so the
second question costs seconds less than the first.

    python -m benchmarks.memory_rows rows.csv           # check us against your own card
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


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
    """Where the weights are loaded and quantized on the card, the dtype they arrive in; leaves its marks on `reserved`."""
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
            root = Path(__file__).resolve().parents[2]
            no_card = os.environ | {
                "CUDA_VISIBLE_DEVICES": ""
            }  # importing bitsandbytes would else take a context on the card
            self._process = subprocess.Popen(
                [sys.executable, "-m", "helpers.dryrun.worker"],
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

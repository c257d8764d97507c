"""A pretended CUDA card for `benchmarks.gpu`: its cases run as they would there, with a tiny model, on the CPU.

    python -m tests.rehearsal.gpu_shim SOCKET                       # imports everything once, then forks for each case
    python -m tests.rehearsal.gpu_shim SOCKET '{"kind": ...}' FILE  # asks for one case and ends as it ended: a case's command

What is real: planning, dry runs, building and quantizing, the kit's trainer with fp16's gradient scaler, checkpoints, evaluation, generation.
What is pretended: the card's name and memory, running out of it (once, in the second step after the limit was lowered), and CUDA streams.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import tempfile
import time
import traceback
import types
from collections.abc import Callable
from dataclasses import replace
from typing import Any

if len(sys.argv) > 2:  # the client needs none of what follows
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(sys.argv[1])
        connection.sendall(json.dumps({"arguments": sys.argv[2:], "environment": dict(os.environ)}).encode() + b"\n")
        answer = json.loads(connection.makefile().readline())
    print(answer["said"], file=sys.stderr)
    sys.exit(answer["status"])

import pytest
import torch
import trl
import trl.trainer.sft_trainer

from benchmarks import gpu_cases, gpu_model
from helpers import dryrun
from helpers import registry as catalog
from helpers import train as training
from helpers import trainer as helpers_trainer
from helpers.hardware import EXPANDABLE, GIB, MIB, Gpu
from tests.rehearsal.card import pretend_card

TOTAL = 80 * GIB
RESERVED, PEAK = 300 * MIB, 340 * MIB  # what the pretended allocator answers
TINY = catalog.BaseModel("pretended/tiny", catalog.ModelShape("llama", 64, 128, 2, 4, 2, 16, 512, True, 8192))
TOKENS = 64
SLOW_STEP = 1.0  # seconds that the first two steps of "plain" take longer


class Card:
    """What `torch.cuda` is asked by the benchmark, and complaints about the order of the questions."""

    def __init__(self) -> None:
        self.limit, self.running_out, self.emptied = 1.0, False, False

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        return TOTAL - GIB - RESERVED, TOTAL

    def empty_cache(self) -> None:
        self.emptied = True

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        assert self.emptied, "a peak must begin with the allocator's cache emptied"
        self.emptied = False

    def set_per_process_memory_fraction(self, fraction: float, device: Any = None) -> None:
        self.running_out = fraction < self.limit and self.limit < 1
        self.limit = fraction

    def functions(self) -> dict[str, Any]:
        names = ("mem_get_info", "empty_cache", "reset_peak_memory_stats", "set_per_process_memory_fraction")
        answers = {
            "get_device_name": "Pretended card",
            "get_device_capability": (9, 0),
            "memory_snapshot": [],
            "synchronize": None,
            "memory_reserved": RESERVED,
            "memory_allocated": RESERVED,
            "max_memory_reserved": PEAK,
            "max_memory_allocated": PEAK,
        }
        return {name: getattr(self, name) for name in names} | {
            name: (lambda *args, value=value: value) for name, value in answers.items()
        }


class WithACard(types.ModuleType):
    """`torch` for one module, to which a card is there."""

    cuda = types.SimpleNamespace(is_available=lambda: True, empty_cache=lambda: torch.cuda.empty_cache())

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def pretend(case: dict[str, Any], patch: pytest.MonkeyPatch) -> None:
    """From here on, this process has the pretended card."""
    card = Card()
    for name, function in card.functions().items():
        patch.setattr(torch.cuda, name, function)
    growing = EXPANDABLE in os.environ["PYTORCH_ALLOC_CONF"]
    gpu = Gpu("Pretended card", "cuda", TOTAL, TOTAL - GIB, (9, 0), has_context=True, flash=True, expandable=growing)
    patch.setattr(gpu_cases, "detect_gpu", lambda: gpu)
    patch.setattr(gpu_model, "DEVICE", "cpu")
    patch.setattr(helpers_trainer, "torch", WithACard("torch"))
    # fp16 begins with a scale that must overflow, so that skipped steps are seen.
    pretend_card(patch, scale=2.0**40 if case["step"] == "fp16" else 2.0**10)
    for module, name in ((training, "sft_config"), (gpu_cases, "load_quantized")):
        patch.setattr(module, name, on_a_cpu(getattr(module, name)))

    step = trl.SFTTrainer.training_step

    def training_step(trainer: trl.SFTTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        if card.running_out and trainer.state.global_step == 1:
            card.running_out = False
            raise torch.OutOfMemoryError("pretended")
        if case["step"] == "plain" and trainer.state.global_step < gpu_cases.WARM_UP:
            time.sleep(SLOW_STEP)
        return step(trainer, *args, **kwargs)

    patch.setattr(trl.SFTTrainer, "training_step", training_step)


def on_a_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function(config, plan, ...)` for a plan with the same settings on a CPU."""
    return lambda config, plan, *args: function(config, replace(plan, gpu=replace(plan.gpu, kind="cpu")), *args)


def run(question: dict[str, Any]) -> int:
    """One case, in a process that was forked for it."""
    os.environ |= question["environment"]
    case, file = question["arguments"]
    case = json.loads(case) | {"max_length": TOKENS}
    pretend(case, pytest.MonkeyPatch())
    # The worker for dry runs is the server's child and serves all cases in turn; only its parent can ask whether it lives.
    dryrun._worker._process.poll = lambda: None
    try:
        return gpu_cases.main([json.dumps(case), file])
    except BaseException:
        traceback.print_exc()
        return 1


def serve(address: str) -> None:
    torch.set_num_threads(
        1
    )  # the matrices are tiny, and threads that wait for each other take the other core from the worker
    catalog.CATALOG["tiny"] = TINY
    dryrun.missing_names()  # starts the worker
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(address)
        listening.listen()
        while True:
            connection, _ = listening.accept()
            with connection, tempfile.TemporaryFile("w+") as said:
                question = json.loads(connection.makefile().readline())
                child = os.fork()
                if not child:
                    os.dup2(said.fileno(), 1)
                    os.dup2(said.fileno(), 2)
                    status = run(question)
                    sys.stdout.flush()
                    sys.stderr.flush()
                    os._exit(status)
                status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
                said.seek(0)
                answer = {"status": status, "said": said.read()}
                with contextlib.suppress(OSError):  # who asked may have run out of time
                    connection.sendall(json.dumps(answer).encode() + b"\n")


if __name__ == "__main__":
    serve(sys.argv[1])

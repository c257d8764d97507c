"""The process behind `helpers.dryrun`: runs one step of the real model on the meta device.

Reads one `Step` as JSON per line, answers one `Peak` as JSON per line; null asks for the names that TRL lacks. It replaces functions
of other libraries, which is why it is a process of its own and why nothing else may import it.
"""

from __future__ import annotations

import contextlib
import gc
import json
import sys
from dataclasses import asdict
from typing import Any

import bitsandbytes as bnb
import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel

from helpers.compat import missing_names, set_checkpointing
from helpers.dryrun import Peak, Step
from helpers.dryrun.allocator import simulate
from helpers.dryrun.model import build, load
from helpers.dryrun.patches import make_batch, patch
from helpers.dryrun.tracker import MemoryTracker
from helpers.memory import CUBLAS_WORKSPACES

Batch = dict[str, torch.Tensor]
# Steps that agree in these can use the same model.
ADAPTER_FIELDS = ("r", "target_modules", "lora_dropout", "adapter_dtype")
QUANTIZATION_FIELDS = ("quantization", "double_quant", "dtype", "fp32_upcast")
BUILD_FIELDS = ("model", "attention", "loss_head", "device", *ADAPTER_FIELDS, *QUANTIZATION_FIELDS)


def run(step: Step, model: PreTrainedModel) -> Peak:
    """Run `step` on `model` and measure it."""
    gc.collect()
    tracker = MemoryTracker()
    autocast = patch(step, tracker)
    reentrant = step.checkpointing == "reentrant"
    set_checkpointing(model, "on" if reentrant else step.checkpointing, reentrant=reentrant)
    loading = load(step, model, tracker)
    loaded = len(tracker.trace)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    eight_bit = step.optimizer == "adamw_8bit"
    optimizer = bnb.optim.AdamW8bit(trainable) if eight_bit else torch.optim.AdamW(trainable, foreach=True)
    with tracker:
        batch = make_batch(step)
        if step.phase != "generate":  # as from the second step on, with the optimizer's state already there
            add_gradients(trainable)
            update(optimizer)
        if step.phase == "train":
            if step.accumulating:
                add_gradients(trainable)
            tracker.peak = tracker.flops = tracker.bytes_moved = 0
            with saved_tensors_hooks(to_host, from_host) if step.offload else contextlib.nullcontext():
                loss, outputs = forward(step, model, batch)
            autocast.kept = None
            loss.backward()  # with the outputs still held, as a training loop does
            del loss, outputs
            update(optimizer)
        else:
            model.eval()
            with torch.no_grad():
                if step.phase == "evaluate":
                    forward(step, model, batch)
                else:
                    model(**batch, use_cache=True, logits_to_keep=1)
            model.train()
    workspaces = [(("workspace", number), CUBLAS_WORKSPACES // 2) for number in (0, 1)]
    allocator = simulate([*workspaces, *tracker.trace[loaded:]], before=loading, expandable=step.expandable)
    return Peak(
        allocated=allocator.peak_allocated,
        reserved=allocator.peak_reserved,
        live_peak=tracker.peak,
        resident=tracker.live - sum(tensor.nbytes for tensor in batch.values()),
        flops=tracker.flops,
        bytes_moved=tracker.bytes_moved,
    )


def forward(step: Step, model: PreTrainedModel, batch: Batch) -> tuple[torch.Tensor, Any]:
    """(loss, everything the model returned). Full logits stay alive with the latter."""
    if step.loss_head == "full":
        outputs = model(**batch, labels=batch["input_ids"])
        return outputs.loss, outputs
    outputs = model(**batch, labels=batch["input_ids"], fused_lm_head=True)
    return -outputs.log_probs.sum() / batch["input_ids"].numel(), outputs


def add_gradients(trainable: list[torch.nn.Parameter]) -> None:
    """As an earlier micro-batch leaves them."""
    for parameter in trainable:
        parameter.grad = torch.zeros_like(parameter)


def update(optimizer: torch.optim.Optimizer) -> None:
    """The optimizer's step; gradients are released after it."""
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def to_host(tensor: torch.Tensor) -> Any:
    """A saved activation leaves the card, as with TRL's activation offloading; only its layout is remembered here."""
    if isinstance(tensor, torch.nn.Parameter) or tensor.nbytes < 1024:
        return tensor
    return tensor.shape, tensor.stride(), tensor.dtype


def from_host(packed: Any) -> torch.Tensor:
    """It comes back when needed."""
    if isinstance(packed, torch.Tensor):
        return packed
    shape, stride, dtype = packed
    return torch.empty_strided(shape, stride, dtype=dtype, device="meta")


def serve() -> None:
    """Answer until the input ends. The model of the last question is kept: the next is often about another batch for it."""
    questions, answers = sys.stdin, sys.stdout
    sys.stdout = sys.stderr  # whatever a library prints must not be taken for an answer
    built = model = None
    for line in questions:
        question = json.loads(line)
        try:
            if question is None:
                answer: dict[str, Any] = {"missing": missing_names()}
            else:
                step = Step(**question)
                wanted = [getattr(step, name) for name in BUILD_FIELDS]
                if wanted != built:
                    built = model = None
                    gc.collect()
                    built, model = wanted, build(step)
                answer = asdict(run(step, model))
        except Exception as error:  # reported to the caller; the worker lives on
            built = model = None
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve()

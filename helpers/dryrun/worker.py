"""The process behind `helpers.dryrun`: runs one step of the real model on the meta device.

Reads one `Step` as JSON per line, answers one `DryRun` as JSON per line. Everything in here patches freely (attention functions,
TRL's kernels, bitsandbytes' caches), which is why it is a process of its own and why nothing else may import it.
"""

from __future__ import annotations

import contextlib
import gc
import json
import sys
import time
from dataclasses import asdict
from typing import Any

import bitsandbytes as bnb
import torch
import trl.kernels.chunked_logprob as trl_kernels
import trl.trainer.utils as trl_utils
from transformers import PreTrainedModel

from helpers.compat import missing_names, set_checkpointing
from helpers.dryrun import DryRun, Step
from helpers.dryrun.allocator import CachingAllocator
from helpers.dryrun.model import build, choose_attention, make_batch, resident_tensors
from helpers.dryrun.tracker import MemoryTracker
from helpers.memory import CUBLAS_WORKSPACES

ORIGINAL = {
    name: getattr(trl_kernels, name, None) for name in ("_forward_tile", "_backward_tile", "_addmm_fp32", "_use_triton")
}
ORIGINAL_LINEAR, ORIGINAL_SOFTMAX = torch.nn.functional.linear, torch.nn.functional.softmax
ORIGINAL_AUTOCAST = torch.is_autocast_enabled


# ------------------------------------------------------------------------------------------------------- the step


class FusedSoftmax(torch.autograd.Function):
    """CUDA turns fp16 scores into fp32 probabilities in one kernel; the meta device would make an fp32 copy first."""

    @staticmethod
    def forward(ctx: Any, scores: torch.Tensor) -> torch.Tensor:
        probabilities = torch.empty(scores.shape, dtype=torch.float32, device=scores.device)
        ctx.save_for_backward(probabilities)
        ctx.dtype = scores.dtype
        return probabilities

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (probabilities,) = ctx.saved_tensors
        product = gradient * probabilities  # noqa: F841  the kernel's own temporary
        return torch.empty(probabilities.shape, dtype=ctx.dtype, device=gradient.device)


class Autocast:
    """What `torch.autocast` does to a QLoRA model, for the meta device, which it refuses: fp32 weights of linear layers (the
    adapters) are cast for each multiplication, and the casts are kept until the forward pass ends."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.kept: dict[int, torch.Tensor] | None = {}

    def linear(self, inputs: torch.Tensor, weight: torch.Tensor, *bias: torch.Tensor | None) -> torch.Tensor:
        if weight.dtype is not torch.float32:
            return ORIGINAL_LINEAR(inputs, weight, *bias)
        cast = self.kept.get(id(weight)) if self.kept is not None else None
        if cast is None:
            cast = weight.to(self.dtype)
            if self.kept is not None:
                self.kept[id(weight)] = cast
        return ORIGINAL_LINEAR(inputs.to(self.dtype), cast, *bias)

    def end_of_forward(self) -> None:
        """Casts are dropped; what the backward pass recomputes casts anew."""
        self.kept = None


def choose_arithmetic(step: Step) -> Autocast:
    """Make linear layers and softmax behave as on the card, in the backward pass's recomputation too (so: patched, not a mode)."""
    autocast = Autocast(getattr(torch, step.dtype))
    torch.nn.functional.linear = autocast.linear if step.autocast else ORIGINAL_LINEAR

    def softmax(scores: torch.Tensor, *args: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> torch.Tensor:
        if scores.is_meta and scores.dtype is torch.float16 and dtype is torch.float32:
            return FusedSoftmax.apply(scores)
        return ORIGINAL_SOFTMAX(scores, *args, dtype=dtype, **kwargs)

    torch.nn.functional.softmax = softmax
    return autocast


def choose_loss_head(step: Step, tracker: MemoryTracker) -> None:
    """Let TRL's head run on the meta device as it runs on the card: with Triton no temporaries, without them the torch ones."""
    torch.is_autocast_enabled = ORIGINAL_AUTOCAST
    if step.device == "meta":
        # PEFT asks without a device (its inputs then stay as they are), TRL's head asks for the device of its tensors.
        torch.is_autocast_enabled = lambda device=None: step.autocast and device is None
    if step.loss_head == "full":
        return
    if missing_names():
        raise RuntimeError(f"TRL has no {', '.join(missing_names())}, so its loss head cannot be followed")
    trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE = step.loss_tile
    for name, function in ORIGINAL.items():
        setattr(trl_kernels, name, function)
    trl_utils._use_triton = ORIGINAL["_use_triton"]
    if step.device != "meta":
        return

    def add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:  # CUDA sums in fp32 without copies
        tracker.flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]

    trl_kernels._addmm_fp32 = add_product
    if step.loss_head == "triton":
        trl_utils._use_triton = lambda device: True
        trl_kernels._forward_tile = trl_kernels._backward_tile = lambda *tile_and_statistics, **flags: None


def make_optimizer(step: Step, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return (
        bnb.optim.AdamW8bit(parameters)
        if step.optimizer == "adamw_8bit"
        else torch.optim.AdamW(parameters, foreach=True)
    )


class HostMemory:
    """Saved activations leave the card and come back when needed, as with TRL's activation offloading. Counts their bytes."""

    def __init__(self) -> None:
        self.bytes = 0

    def pack(self, tensor: torch.Tensor) -> Any:
        if isinstance(tensor, torch.nn.Parameter) or tensor.numel() * tensor.element_size() < 1024:
            return tensor
        self.bytes += tensor.numel() * tensor.element_size()
        return tensor.shape, tensor.stride(), tensor.dtype

    def unpack(self, packed: Any) -> torch.Tensor:
        return (
            packed
            if isinstance(packed, torch.Tensor)
            else torch.empty_strided(*packed[:2], dtype=packed[2], device="meta")
        )


def run(step: Step, model: PreTrainedModel) -> DryRun:
    """Run `step` on `model` and measure it, with the optimizer's state already beside it, as from the second step on."""
    started = time.perf_counter()
    gc.collect()
    tracker, host = MemoryTracker(), HostMemory()
    choose_attention(step)
    choose_loss_head(step, tracker)
    reentrant = step.checkpointing == "reentrant"
    set_checkpointing(model, "on" if reentrant else step.checkpointing, reentrant=reentrant)
    for tensor in resident_tensors(model):
        tracker.add(tensor)
    after_loading = len(tracker.trace)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(step, trainable)
    autocast = choose_arithmetic(step)
    offload = (
        torch.autograd.graph.saved_tensors_hooks(host.pack, host.unpack) if step.offload else contextlib.nullcontext()
    )
    with tracker:
        batch = make_batch(step)
        if step.phase == "train":
            for parameter in trainable:
                parameter.grad = torch.zeros_like(parameter)
            update(optimizer)
            tracker.peak = tracker.flops = tracker.bytes_moved = 0
            with offload:
                loss, outputs = forward(step, model, batch)
            autocast.end_of_forward()
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
    resident = tracker.live - sum(tensor.numel() * tensor.element_size() for tensor in batch.values())
    loading = load_trace(step, model) if step.load_in else tracker.trace[:after_loading]
    workspaces = [(("workspace", n), CUBLAS_WORKSPACES // 2) for n in (0, 1)]
    allocator = CachingAllocator(expandable=step.expandable).run(loading)
    allocator.reset_peaks()
    allocator.run([*workspaces, *tracker.trace[after_loading:]])
    return DryRun(
        allocated=allocator.peak_allocated,
        reserved=allocator.peak_reserved,
        live_peak=tracker.peak,
        resident=resident,
        host=host.bytes,
        flops=tracker.flops,
        bytes_moved=tracker.bytes_moved,
        seconds=time.perf_counter() - started,
        peak_operation=tracker.peak_operation,
    )


def update(optimizer: torch.optim.Optimizer) -> None:
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def forward(step: Step, model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, Any]:
    """(loss, everything the model returned). Full logits stay alive with the latter."""
    if step.loss_head == "full":
        outputs = model(**batch, labels=batch["input_ids"])
        return outputs.loss, outputs
    outputs = model(**batch, labels=batch["input_ids"], fused_lm_head=True)
    return -outputs.log_probs.sum() / batch["input_ids"].numel(), outputs


def load_trace(step: Step, model: PreTrainedModel) -> list[tuple[Any, int]]:
    """What loading does to the allocator: a warm-up block, weights arriving in 16 bit, quantized and upcast one after another.

    The tensors that stay get the names 1, 2, ... in the order of `resident_tensors`, as the tracker gives them.
    """
    element = torch.empty(0, dtype=getattr(torch, step.load_in)).element_size()
    names: dict[int, int] = {}
    trace: list[tuple[Any, int]] = []
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    whole = sum(
        original_numel(parameter) * (0.5 if hasattr(parameter, "quant_state") else element) for parameter in frozen
    )
    trace += [
        ("warm-up", int(whole)),
        ("warm-up", -1),
    ]  # transformers asks for the model's size in one piece and gives it back
    waiting: list[tuple[int, int]] = []
    for tensor in resident_tensors(model):
        key = tensor.untyped_storage()._cdata
        size = -(-tensor.untyped_storage().nbytes() // 512) * 512
        if key in names or not size:
            continue
        names[key] = len(names) + 1
        quantized = getattr(tensor, "quant_state", None) is not None
        upcast = step.fp32_upcast and tensor.dtype == torch.float32 and not tensor.requires_grad and tensor.dim() > 0
        if quantized:
            arriving = ("16 bit", names[key])
            trace += [(arriving, element * original_numel(tensor)), (names[key], size), (arriving, -1)]
        elif upcast and isinstance(tensor, torch.nn.Parameter):
            trace.append((("16 bit", names[key]), element * tensor.numel()))
            waiting.append((names[key], size))
        else:
            trace.append((names[key], size))
    for name, size in waiting:  # the upcast runs over the loaded model
        trace += [(name, size), (("16 bit", name), -1)]
    return trace


def original_numel(parameter: torch.Tensor) -> int:
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()


# ----------------------------------------------------------------------------------------------------- the process


# Steps that agree in these can use the same model.
BUILD_FIELDS = (
    "model",
    "r",
    "target_modules",
    "lora_dropout",
    "adapter_dtype",
    "quantization",
    "double_quant",
    "dtype",
    "fp32_upcast",
    "attention",
    "loss_head",
    "device",
)


class Models:
    """Keeps the model of the last question: the next one is often about the same model with another batch."""

    def __init__(self) -> None:
        self.key, self.model = "", None

    def get(self, step: Step) -> PreTrainedModel:
        key = json.dumps([getattr(step, name) for name in BUILD_FIELDS])
        if key != self.key:
            self.model = None
            gc.collect()
            self.key, self.model = key, build(step)
        return self.model


def serve() -> None:
    questions, answers = sys.stdin, sys.stdout
    sys.stdout = sys.stderr  # whatever a library prints must not be taken for an answer
    models = Models()
    print(json.dumps({"missing": missing_names()}), file=answers, flush=True)
    for line in questions:
        step = Step(**json.loads(line))
        try:
            answer = asdict(run(step, models.get(step)))
        except Exception as error:  # reported to the caller; the worker lives on
            models = Models()
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve()

"""Makes the kit's own trainer do on a CPU what it does on a card: 16-bit arithmetic by autocast, and fp16's real gradient scaler.

    witness = pretend_card(monkeypatch)
    job["plan"] = card_plan(job["plan"], "float16")         # dtype, optimizer, checkpointing, loss head as on a T4
    training.train(**job)

What a CPU cannot show: CUDA's kernels and their memory, seconds, and whether the activations of a real model fit into fp16.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from bitsandbytes.backends.default.ops import _gemm_4bit_default_impl
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback
from trl.kernels import chunked_logprob as trl_kernels
from trl.models import activation_offloading

from helpers import train as training
from helpers.plan import Plan

OFFLOAD = activation_offloading.OffloadActivations


class Witness(TrainerCallback):
    """Sees what a card's training must be like, while it goes on: skipped steps, and the types that parameters have."""

    def __init__(self) -> None:
        self.steps = self.skipped = 0
        self.adapter_dtypes: set[torch.dtype] = set()
        self.other_dtypes: set[torch.dtype] = set()
        self.trainer: Any = None

    def on_step_end(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        self.steps += 1
        self.skipped += bool(getattr(optimizer, "step_was_skipped", False))
        for parameter in model.parameters():
            (self.adapter_dtypes if parameter.requires_grad else self.other_dtypes).add(parameter.dtype)


class TensorCores(TorchDispatchMode):
    """While it is open, products of fp16 matrices, attention's included, are summed in fp32 and rounded once, as a T4's tensor cores do.

    CPUs without fp16 arithmetic do that too, but up to ten times slower than in fp32.
    """

    def __torch_dispatch__(self, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if operation is torch.ops.bitsandbytes.gemm_4bit.default:  # it unpacks the weight and multiplies
            with self:
                return _gemm_4bit_default_impl(*args, **kwargs)
        halves = [argument for argument in args if torch.is_tensor(argument) and argument.dtype is torch.float16]
        if not halves or (operation not in PRODUCTS and operation not in ATTENTION):
            return operation(*args, **kwargs)
        if operation in ATTENTION:
            single = {name: _in(torch.float32, value) for name, value in kwargs.items()}
            results = operation(*(_in(torch.float32, argument) for argument in args), **single)
            return tuple(
                result if index in ATTENTION[operation] else _in(torch.float16, result)
                for index, result in enumerate(results)
            )
        product = PRODUCTS[operation](*(_in(torch.float32, argument) for argument in args))
        return kwargs["out"].copy_(product) if "out" in kwargs else product.half()


def _in(dtype: torch.dtype, value: Any) -> Any:
    return value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value


aten = torch.ops.aten
PRODUCTS = {aten.mm.default: aten.mm, aten.mm.out: aten.mm, aten.bmm.default: aten.bmm, aten.addmm.default: aten.addmm}
FORWARD = aten._scaled_dot_product_flash_attention_for_cpu.default
BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
ATTENTION = {FORWARD: {1}, BACKWARD: set()}  # with the results that stay fp32: the sums' logarithms


def card_plan(plan: Plan, dtype: str, loss_head: str = "torch", **changes: Any) -> Plan:
    """A CPU's plan with a card's arithmetic: `dtype`, the 8-bit optimizer, and a loss head that need not be tried any more."""
    gpu = replace(plan.gpu, fused_head=loss_head)
    return replace(plan, gpu=gpu, dtype=dtype, optimizer="adamw_8bit", loss_head=loss_head, **changes)


def pretend_card(monkeypatch: pytest.MonkeyPatch, scale: float = 2.0**16) -> Witness:
    """From here to the end of the test, `build_trainer` and `train` calculate in `plan.dtype`, as on a card.

    accelerate refuses fp16 on a CPU, so what it would set up for a card is set up here: autocast, and for fp16 a gradient scaler that
    begins at `scale`. TRL's Triton kernels are interpreted where the plan says "triton".
    """
    witness, build = Witness(), training.build_trainer

    def build_as_on_a_card(config: Any, plan: Plan, *args: Any, **kwargs: Any) -> Any:
        trainer = build(config, plan, *args, **kwargs)
        if plan.dtype != "float32":
            trainer.accelerator.native_amp = True
        if plan.dtype == "float16":
            trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        monkeypatch.setattr(
            trl_kernels, "_use_triton", lambda device: plan.loss_head == "triton"
        )  # interpreted, on a CPU
        trainer.add_callback(witness)
        witness.trainer = trainer
        return trainer

    monkeypatch.setattr(training, "build_trainer", build_as_on_a_card)
    # Offloading then moves activations from one part of RAM to another; without streams and pinned memory, which only cards have.
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *args, **kwargs: torch.device("cpu"))
    monkeypatch.setattr(
        activation_offloading,
        "OffloadActivations",
        lambda **settings: OFFLOAD(**settings | {"use_pin_memory": False, "use_streams": False}),
    )
    monkeypatch.setattr(torch.cpu, "empty_cache", lambda: None, raising=False)
    asked = torch.is_autocast_enabled
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device="cpu": asked("cpu"))  # PEFT asks for CUDA's state
    return witness

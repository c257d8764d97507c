"""A `Plan`: how a config will be trained on one card, and what that needs. The search for the best one is `helpers.planner`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from helpers.config import TrainConfig
from helpers.dryrun import Peak, Step
from helpers.hardware import MIB, Gpu, attention, speed
from helpers.memory import ADAMW, ADAMW_8BIT, CUDA_CONTEXT, FOR_MANY_GPUS, MemoryEstimate, estimate
from helpers.page import filled
from helpers.registry import ModelShape

RESERVE_SHARE, RESERVE_BYTES = 0.03, 200 * MIB  # kept free: what a driver, a desktop or the next kernel may want
SHORTEST_SEQUENCE = 128
SMALL_TILE = 4096  # vocabulary entries per tile of TRL's torch loss head, where its temporaries would be the peak


@dataclass(frozen=True)
class Plan:
    """How a config will be trained. Sizes in bytes, for one card, of which there may be several."""

    model: str
    gpu: Gpu
    dtype: str
    optimizer: str
    seq_len: int
    micro_batch: int
    accumulation: int
    checkpointing: str = "on"
    offload: bool = False
    eval_batch: int = 1
    generation_batch: int = 1
    loss_head: str = "torch"
    loss_tile: int = 32768
    gpus: int = 1
    sharded: bool = False
    budget: int = 0
    memory: MemoryEstimate | None = None
    """The formula's parts; None where the model is not modeled."""
    measured: Peak | None = None
    """The dry run that decided; None where the formula did."""
    reasons: list[str] = field(default_factory=list)

    @property
    def peak_bytes(self) -> int | None:
        """What the card has to give: reserved by the dry run plus the CUDA context if it is still to come, or the formula's total."""
        if self.measured is not None:
            # The dry run is of one card; what several need besides is in the formula's parts.
            context = 0 if self.gpu.has_context else CUDA_CONTEXT
            return self.measured.reserved + context + sum(self.memory.parts.get(name, 0) for name in FOR_MANY_GPUS)
        return self.memory.total_bytes if self.memory else None

    @property
    def seconds_per_step(self) -> float | None:
        """About how long one optimizer step takes, from the dry run's counted work; None where this card's speed is unknown."""
        rate = speed(self.gpu)
        if self.measured is None or not rate.source:
            return None
        return self.accumulation * rate.seconds(self.measured.flops, self.measured.bytes_moved)

    def __str__(self) -> str:
        return "\n".join(filled("- ", reason) for reason in self.reasons)


def reserve(gpu: Gpu) -> int:
    """Bytes that a plan leaves free, for what others take meanwhile."""
    return int(max(RESERVE_SHARE * gpu.free_bytes, RESERVE_BYTES))


def budget(gpu: Gpu) -> int:
    """Bytes that a plan may use on this card: what is free, less a reserve."""
    return gpu.free_bytes - reserve(gpu)


def lengths(longest: int) -> Iterator[int]:
    """The wanted length, then shorter ones: three quarters, a half, ... down to 128 tokens."""
    yield longest
    length = longest
    while length * 3 // 4 >= SHORTEST_SEQUENCE:
        length = length * 3 // 4
        yield length // 8 * 8


def with_memory(config: TrainConfig, plan: Plan, shape: ModelShape) -> Plan:
    """`plan` with the formula's estimate, and with a smaller loss tile where the loss head's temporaries would be the peak."""
    for tile in (plan.loss_tile, SMALL_TILE):
        memory = estimate_of(config, replace(plan, loss_tile=tile), shape)
        if plan.loss_head != "torch" or memory.peak_moment != "computing the loss" or plan.gpu.kind != "cuda":
            break
    return replace(plan, memory=memory, loss_tile=tile)


def estimate_of(config: TrainConfig, plan: Plan, shape: ModelShape) -> MemoryEstimate:
    """The formula's answer for this plan."""
    on_gpu = plan.gpu.kind == "cuda"
    return estimate(
        shape,
        plan.micro_batch,
        plan.seq_len,
        r=config.r,
        target_modules=config.target_modules,
        checkpointing=plan.checkpointing,
        quantization=config.quantization,
        element_bytes=4 if plan.dtype == "float32" else 2,
        optimizer_bytes=ADAMW_8BIT if plan.optimizer == "adamw_8bit" else ADAMW,
        attention=attention(plan.gpu, shape)[0],
        loss_head=plan.loss_head,
        loss_tile=plan.loss_tile,
        offload=plan.offload,
        on_gpu=on_gpu,
        context=not plan.gpu.has_context,
        gpus=plan.gpus,
        sharded=plan.sharded,
    )


def step_of(config: TrainConfig, plan: Plan, shape: ModelShape, phase: str = "train", micro_batch: int = 0) -> Step:
    """The step that this plan will run, for the dry run. Micro-batches above one are padded, so attention gets a mask."""
    micro_batch = micro_batch or plan.micro_batch
    return Step(
        model=shape.to_config(),
        micro_batch=micro_batch,
        seq_len=plan.seq_len,
        phase=phase,
        r=config.r,
        target_modules=config.target_modules,
        lora_dropout=config.lora_dropout,
        quantization=config.quantization,
        dtype=plan.dtype,
        checkpointing=plan.checkpointing,
        offload=plan.offload,
        attention=attention(plan.gpu, shape)[0],
        masked=micro_batch > 1,
        loss_head=plan.loss_head,
        loss_tile=plan.loss_tile,
        optimizer=plan.optimizer,
        expandable=plan.gpu.expandable,
        load_in=plan.dtype,
        autocast=plan.dtype != "float32" and phase != "generate",  # Trainer's; without it, adapters calculate in fp32
    )

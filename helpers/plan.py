"""A `Plan`: how a config will be trained on one card, what that needs, and why, in words. `helpers.planner` searches the best one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from typing import Any

from helpers.config import TrainConfig
from helpers.cutting import Mode, modes_of
from helpers.dryrun import Peak, Step
from helpers.hardware import GIB, MIB, Gpu, attention, speed
from helpers.memory import ADAMW, ADAMW_8BIT, CUDA_CONTEXT, FOR_MANY_GPUS, MemoryEstimate, estimate
from helpers.page import filled
from helpers.recipe import total_steps
from helpers.registry import CATALOG, ModelShape, find_shape
from helpers.typical import TypicalCut, typical_cut

RESERVE_SHARE, RESERVE_BYTES = 0.03, 200 * MIB  # kept free: what a driver, a desktop or the next kernel may want
# What micro-batches of many shapes, one after the other, take more than the largest alone, and what the allocator may round up between
# the shapes that were dry-run. By whether its segments grow: `python -m benchmarks.replay`.
HEADROOM = {True: 128 * MIB, False: 512 * MIB}
SHORTEST_SEQUENCE = 128
ABOUT_THE_CARD = 3  # reasons with which a plan begins, before it comes to steps
LOOKED_AT = 60  # steps at most, to say how a step is cut
SMALL_TILE = 4096  # vocabulary entries per tile of TRL's torch loss head, where its temporaries would be the peak
CLEARLY_LESS = 0.9  # of what has just failed
REPLICATED = "replicated (DDP): each GPU holds all weights; only the adapters' gradients travel, once per step"
SHARDED = "sharded (FSDP2): each GPU holds a part of every layer, and layers travel; by the formula, not yet measured"


@dataclass(frozen=True)
class Plan:
    """How a config will be trained. Sizes in bytes, for one card, of which there may be several."""

    model: str
    gpu: Gpu
    dtype: str
    optimizer: str
    seq_len: int
    """Tokens of the longest example; longer ones are cut."""
    micro_batch: int
    """Examples in each of the equal micro-batches into which a step *can* be cut whatever their lengths: all may be of `seq_len` tokens.
    So it is done by the exported script, and where the config fixes it; else `helpers.cutting` finds better micro-batches for each step."""
    accumulation: int
    """How many such micro-batches make a step."""
    checkpointing: str = "on"
    offload: bool = False
    eval_batch: int = 1
    generation_batch: int = 1
    loss_head: str = "torch"
    loss_tile: int = 32768
    gpus: int = 1
    sharded: bool = False
    budget: int = 0
    modes: tuple[Mode, ...] = ()
    """How the micro-batches may run into which `helpers.cutting` cuts a step, quickest first. Empty: in one way, with as many tokens as the
    equal ones above; or in just these, if the config fixes their size."""
    eval_mode: Mode | None = None
    """The same for evaluation."""
    largest_bytes: int = 0
    """What the largest micro-batch takes that any of the modes has room for."""
    cut: TypicalCut | None = None
    """How the steps will be cut, by the lengths that the plan was made for."""
    memory: MemoryEstimate | None = None
    """The formula's parts for `micro_batch` examples of full length; None where the model is not modeled."""
    measured: Peak | None = None
    """The dry run of them; None where the formula decided."""
    reasons: list[str] = field(default_factory=list)

    @property
    def peak_bytes(self) -> int | None:
        """What the card has to give, at most: for equal micro-batches, or for the largest that any mode has room for."""
        if self.memory is None and self.measured is None:
            return None
        peak = self.memory.total_bytes if self.memory else 0
        if self.measured is not None:
            # The dry run is of one card; what several need besides is in the formula's parts.
            parts = self.memory.parts if self.memory else {}
            context = 0 if self.gpu.has_context else CUDA_CONTEXT
            peak = self.measured.reserved + context + sum(parts.get(name, 0) for name in FOR_MANY_GPUS)
        return max(peak, self.largest_bytes)

    @property
    def fits(self) -> bool:
        """Does the card have room for the peak?"""
        return (self.peak_bytes or 0) <= self.budget

    @property
    def seconds_per_step(self) -> float | None:
        """About how long one optimizer step takes, from the dry run's counted work; None where this card's speed is unknown."""
        rate = speed(self.gpu)
        if self.measured is None or not rate.source:
            return None
        if self.cut is not None and self.modes:
            return self.cut.seconds
        return self.accumulation * rate.seconds(self.measured.flops, self.measured.bytes_moved)

    def __str__(self) -> str:
        return "\n".join(filled("- ", reason) for reason in self.reasons)


def reserve(gpu: Gpu) -> int:
    """Bytes that a plan leaves free, for what others take meanwhile."""
    return int(max(RESERVE_SHARE * gpu.free_bytes, RESERVE_BYTES))


def budget(gpu: Gpu) -> int:
    """Bytes that a plan may use on this card: what is free, less a reserve, and less what its allocator loses."""
    return gpu.free_bytes - reserve(gpu) - (HEADROOM[gpu.expandable] if gpu.kind == "cuda" else 0)


def shorter(longest: int) -> Iterator[int]:
    """The wanted length, then shorter ones: three quarters, a half, ... down to 128 tokens."""
    yield longest
    while (longest := longest * 3 // 4) >= SHORTEST_SEQUENCE:
        yield longest // 8 * 8


# ------------------------------------------------------------------------------------------------ what a plan needs


def with_memory(config: TrainConfig, plan: Plan, shape: ModelShape) -> Plan:
    """`plan` with the formula's estimate, and with a smaller loss tile where the loss head's temporaries would be the peak."""
    memory = estimate_of(config, plan, shape)
    if plan.gpu.kind == "cuda" and plan.loss_head == "torch" and memory.peak_moment == "computing the loss":
        plan = replace(plan, loss_tile=SMALL_TILE)
        memory = estimate_of(config, plan, shape)
    return replace(plan, memory=memory)


def estimate_of(config: TrainConfig, plan: Plan, shape: ModelShape) -> MemoryEstimate:
    """The formula's answer for this plan."""
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
        on_gpu=plan.gpu.kind == "cuda",
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
        checkpointing=plan.checkpointing if phase == "train" else "off",
        offload=plan.offload and phase == "train",
        attention=attention(plan.gpu, shape)[0],
        masked=micro_batch > 1,
        loss_head=plan.loss_head,
        loss_tile=plan.loss_tile,
        optimizer=plan.optimizer,
        expandable=plan.gpu.expandable,
        load_in=plan.dtype,
        autocast=plan.dtype != "float32" and phase != "generate",  # Trainer's; without it, adapters calculate in fp32
    )


# ------------------------------------------------------------------------------------------------ how steps are cut


def with_cut(config: TrainConfig, plan: Plan, lengths: Sequence[int] | None) -> Plan:
    """`plan` with the typical cut of its steps for examples of these lengths (tokens), in numbers and in words.

    Without lengths, all are taken to be as long as the plan allows.
    """
    seen = [min(length, plan.seq_len) for length in lengths or [plan.seq_len]]
    steps = min(LOOKED_AT, total_steps(config, len(seen))) if min(seen) < max(seen) else 1
    batch = plan.micro_batch * plan.accumulation
    plan = replace(plan, cut=(cut := typical_cut(seen, modes_of(config, plan)[0], batch, steps, config.seed)))
    words = [str(cut)]
    if not lengths:
        words.append(
            f"so if each has {plan.seq_len} tokens: their lengths are not known yet, and shorter ones take less"
        )
    elif cut.padding_if_equal > cut.padding:
        words.append(f"{100 * cut.padding:.0f} % padding instead of {100 * cut.padding_if_equal:.0f} %")
    if plan.seconds_per_step is not None:
        words.append(f"about {plan.seconds_per_step:.1f} s per step, {speed(plan.gpu).source}")
    others = [reason for reason in plan.reasons if not reason.startswith(f"{batch} examples per step")]
    return replace(plan, reasons=[*others[:ABOUT_THE_CARD], "; ".join(words), *others[ABOUT_THE_CARD:]])


# ------------------------------------------------------------------------------------------------ a plan in words


def explain(config: TrainConfig, plan: Plan, wanted: Plan, shape: ModelShape) -> Iterator[str]:
    """Each choice with its reason. `wanted` is the plan before the search made examples or loss tiles smaller."""
    cards, each = (f" x {plan.gpus} GPUs", " on each GPU") if plan.gpus > 1 else ("", "")
    batch = f"micro-batch {plan.micro_batch} x {plan.accumulation} accumulation{cards}"
    where = "; as the config says" if config.micro_batch_size else "; so in the exported script" if plan.modes else ""
    yield f"{batch} = {config.effective_batch_size} examples per step of {plan.seq_len} tokens{where}"
    yield _why_checkpointing(config, plan, shape)
    if plan.offload:
        yield "activations wait in host memory: without that nothing fits at this length"
    if plan.seq_len < wanted.seq_len:
        yield f"at most {plan.seq_len} tokens per example: {wanted.seq_len} do not fit; longer examples would be cut"
    if plan.loss_tile < wanted.loss_tile:
        yield f"loss computed in tiles of {plan.loss_tile} vocabulary entries, because larger ones would be the peak"
    if plan.gpus > 1:
        yield SHARDED if plan.sharded else REPLICATED
    peak = f"{'at most' if plan.measured else 'about'} {(plan.peak_bytes or 0) / GIB:.1f} GiB"
    free = f"{plan.budget / GIB:.1f} GiB that may be used ({plan.gpu.free_bytes / GIB:.1f} free)"
    yield f"peak {peak} of the {free}{each}"
    if plan.measured:
        batches = f"evaluation in batches of {plan.eval_batch}, generation in batches of {plan.generation_batch}"
        yield f"{batches}: neither needs more"
    if plan.gpus > 1 and plan.seconds_per_step is not None:
        unsent = "without what the GPUs send each other"
        yield f"about {plan.seconds_per_step:.1f} s per step, {unsent}, {speed(plan.gpu).source}"


def _why_checkpointing(config: TrainConfig, plan: Plan, shape: ModelShape) -> str:
    if config.gradient_checkpointing != "auto":
        return f"checkpointing {plan.checkpointing}: the config says so"
    if plan.checkpointing == "off":
        return "checkpointing off: it would save memory that is not needed, and cost time"
    kept = ", keeping attention's output" if plan.checkpointing == "selective" else ""
    why = f"micro-batch {plan.micro_batch} with it is quicker than the smaller one that fits without"
    without = estimate_of(config, replace(plan, checkpointing="off", micro_batch=1), shape).total_bytes
    if without > plan.budget:
        why = f"off would need {without / GIB:.1f} GiB with micro-batch 1, you have {plan.budget / GIB:.1f}"
    return f"checkpointing on{kept}: {why}"


def suggest_alternatives(config: TrainConfig, plan: Plan, shape: ModelShape | None = None) -> str:
    """The sentence for `DoesNotFit`: by how much, and the nearest smaller model, shorter sequence and lower rank that would fit."""
    card, shape = plan.gpu.name, shape or find_shape(plan.model)
    if shape is None:
        return f"{plan.model} does not fit {card} even with micro-batch 1. Use a smaller model, max_length or r."

    def need(of_config: TrainConfig = config, of_shape: ModelShape = shape, **changes: Any) -> int:
        least = replace(plan, micro_batch=1, checkpointing="on", measured=None, largest_bytes=0, **changes)
        return with_memory(of_config, least, of_shape).peak_bytes or 0

    wanted, limit, has = need(), plan.budget, f"{plan.budget / GIB:.1f} GiB to give"
    too_much = f"{card} has {has}, {ceil((wanted - limit) / MIB)} MiB too little"
    if wanted <= limit:  # it ran out although it should have fitted
        limit = int(wanted * CLEARLY_LESS)
        too_much = f"{card} had {has}, and yet it ran out: something else uses its memory"
    # Other models have other layers, so names of layers are of no use for them.
    others = reversed(CATALOG.values()) if config.target_modules == "all-linear" else ()
    smaller = [row for row in others if row.shape.parameters() < shape.parameters()]
    kinds = [
        [("sharded=True", need(sharded=True))] if plan.gpus > 1 and not plan.sharded else [],
        [(f"model={row.short_name!r}", need(of_shape=row.shape)) for row in smaller],
        [(f"max_length={length}", need(seq_len=length)) for length in shorter(plan.seq_len)],
        [(f"r={r}", need(replace(config, r=r))) for r in (64, 32, 16, 8, 4) if r < config.r],
    ]
    nearest = [next((option for option in options if option[1] <= limit), None) for options in kinds]
    fitting = "; ".join(f"{change} ({size / GIB:.1f} GiB)" for change, size in filter(None, nearest))
    so = f"This would fit: {fitting}." if fitting else "Nothing on the menu fits: use a card with more memory."
    least = f"{wanted / GIB:.1f} GiB even with micro-batch 1, {plan.seq_len} tokens and checkpointing"
    return f"{plan.model} needs {least}; {too_much}. {so}"

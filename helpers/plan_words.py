"""A plan in words: each choice with its reason, and what would fit where nothing does."""

from __future__ import annotations

from dataclasses import replace
from math import ceil

from helpers.config import TrainConfig
from helpers.hardware import GIB, MIB, speed
from helpers.plan import Plan, estimate_of, lengths, with_memory
from helpers.registry import CATALOG, ModelShape, find_shape

CLEARLY_LESS = 0.9  # of what has just failed
REPLICATED = "replicated (DDP): each GPU holds all weights; only the adapters' gradients travel, once per step"
SHARED = "sharded (FSDP2): each GPU holds a part of every layer, and layers travel; by the formula, not yet measured"


def explain(config: TrainConfig, plan: Plan, base: Plan, shape: ModelShape) -> list[str]:
    gib = plan.budget / GIB
    cards = f" x {plan.gpus} GPUs" if plan.gpus > 1 else ""
    lines = [
        f"micro-batch {plan.micro_batch} x {plan.accumulation} accumulation{cards} = {config.effective_batch_size} examples per step"
    ]
    if plan.gpu.kind != "cuda":
        lines[0] += "; a larger micro-batch is no faster without a GPU"
    if config.gradient_checkpointing != "auto":
        lines.append(f"checkpointing {plan.checkpointing}: the config says so")
    elif plan.checkpointing == "off":
        lines.append("checkpointing off: it would save memory that is not needed, and cost time")
    else:
        without = estimate_of(config, replace(plan, checkpointing="off", micro_batch=1), shape).total_bytes
        kept = ", keeping attention's output" if plan.checkpointing == "selective" else ""
        if without > plan.budget:
            why = f"off would need {without / GIB:.1f} GiB with micro-batch 1, you have {gib:.1f}"
        else:
            why = f"micro-batch {plan.micro_batch} with it is quicker than the smaller one that fits without"
        lines.append(f"checkpointing on{kept}: {why}")
    if plan.offload:
        lines.append("activations wait in host memory: without that nothing fits at this length")
    if plan.seq_len < base.seq_len:
        lines.append(
            f"at most {plan.seq_len} tokens per example: {base.seq_len} do not fit; longer examples would be cut"
        )
    if plan.loss_tile < base.loss_tile:
        lines.append(
            f"loss computed in tiles of {plan.loss_tile} vocabulary entries, because larger ones would be the peak"
        )
    if plan.gpus > 1:
        lines.append(SHARED if plan.sharded else REPLICATED)
    sign = "=" if plan.measured else "about"
    each = " on each GPU" if plan.gpus > 1 else ""
    lines.append(
        f"peak {sign} {plan.peak_bytes / GIB:.1f} GiB of the {gib:.1f} GiB that may be used ({plan.gpu.free_bytes / GIB:.1f} free){each}"
    )
    if plan.measured:
        lines.append(
            f"evaluation in batches of {plan.eval_batch}, generation in batches of {plan.generation_batch}: neither needs more"
        )
    if plan.seconds_per_step is not None:
        without = ", without what the GPUs send each other" if plan.gpus > 1 else ""
        lines.append(f"about {plan.seconds_per_step:.1f} s per step{without}, {speed(plan.gpu).source}")
    return lines


def suggest_alternatives(config: TrainConfig, base: Plan, shape: ModelShape | None = None) -> str:
    """The sentence for `DoesNotFit`: by how much, and the nearest smaller model, shorter sequence and lower rank that would."""
    shape = shape or find_shape(base.model)
    if shape is None:
        return (
            f"{base.model} does not fit {base.gpu.name} even with micro-batch 1. Use a smaller model, max_length or r."
        )

    def need(of_config: TrainConfig, of_plan: Plan, of_shape: ModelShape) -> int:
        return with_memory(of_config, replace(of_plan, micro_batch=1, checkpointing="on"), of_shape).memory.total_bytes

    wanted, budget = need(config, base, shape), base.budget
    too_much = f"{base.gpu.name} has {budget / GIB:.1f} GiB to give, {ceil((wanted - budget) / MIB)} MiB too little"
    if wanted <= budget:  # it did not fit although it should have
        budget = int(wanted * CLEARLY_LESS)
        too_much = f"{base.gpu.name} had {base.budget / GIB:.1f} GiB to give, and yet it ran out: something else uses its memory"
    smaller = [
        row
        for row in CATALOG.values()
        if row.shape.parameters() < shape.parameters() and config.target_modules == "all-linear"
    ]
    options = [(f"model={row.short_name!r}", need(config, base, row.shape)) for row in reversed(smaller)]
    shorter = [
        (f"max_length={length}", need(config, replace(base, seq_len=length), shape)) for length in lengths(base.seq_len)
    ]
    parts = (
        [("sharded=True", need(config, replace(base, sharded=True), shape))]
        if base.gpus > 1 and not base.sharded
        else []
    )
    lower = [(f"r={r}", need(replace(config, r=r), base, shape)) for r in (64, 32, 16, 8, 4) if r < config.r]
    nearest = [
        next((option for option in kind if option[1] <= budget), None) for kind in (parts, options, shorter, lower)
    ]
    fitting = [f"{change} ({size / GIB:.1f} GiB)" for change, size in filter(None, nearest)]
    return (
        f"{base.model} needs {wanted / GIB:.1f} GiB even with micro-batch 1, {base.seq_len} tokens and checkpointing; {too_much}. "
        + (
            f"This would fit: {'; '.join(fitting)}."
            if fitting
            else "Nothing on the menu fits: use a card with more memory."
        )
    )

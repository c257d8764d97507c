"""The fastest settings that fit this card, for training, evaluation and generation, each with its reason.

    plan = make_plan(config, detect_gpu())
    print(plan)                     # every choice, line by line

The effective batch is kept exactly: micro-batch x accumulation. The formula (`helpers.memory`) ranks what may fit, instantly; on a
CUDA card the dry run (`helpers.dryrun`) decides. Among what fits, the least work per example wins: checkpointing off, then
selective, then on; only then activations wait in host memory, and only then examples get shorter.
"""

from __future__ import annotations

from dataclasses import replace
from math import gcd

from helpers.config import ConfigError, TrainConfig
from helpers.dryrun import measure, missing_names
from helpers.hardware import GIB, Gpu, attention, compute_dtype, loss_head, speed
from helpers.memory import flops_and_bytes, nf4_bytes
from helpers.plan import Plan, budget, estimate_of, lengths, step_of, with_memory
from helpers.plan_words import explain, suggest_alternatives
from helpers.registry import BaseModel, ModelShape, find_model_type, find_shape, resolve

# A CPU gains nothing from a larger micro-batch (2, 4 and 8 trained equally fast on two cores) and pays for it in memory.
CPU_MICRO_BATCH = 2
LOADING_BYTES = (
    1.5 * GIB
)  # RAM that loading a model in NF4 took beside its largest tensor (1.1B model: 1.41 GiB at the peak)
HOST_SHARE = 0.8  # of the free RAM may hold activations
GENERATION_BATCH = 48  # prompts at a time: one pass over the weights serves all of them
PINNED_ROUNDING = (
    2  # buffers in host memory that a card can reach are rounded up to powers of two: at most twice the bytes
)
CHECKPOINTING = ("off", "selective", "on")


class DoesNotFit(RuntimeError):
    """Nothing fits the card. The message says by how much, and what would fit."""


# ------------------------------------------------------------------------------------------------------- the plan


def make_plan(
    config: TrainConfig,
    gpu: Gpu,
    model: str | BaseModel = "",
    *,
    exact: bool | None = None,
    longest_example: int | None = None,
    optimizer: str = "",
    gpus: int = 1,
    sharded: bool = False,
) -> Plan:
    """The fastest settings that fit `gpu`, with the effective batch of `config` kept exactly.

    Args:
        model: what `choose_model` answered: a row of the menu, a Hub id or a folder. Default: `config.model`.
        exact: let the dry run decide (seconds) instead of the formula alone (instant). Default: on a CUDA card.
        longest_example: tokens of the longest example, if it is shorter than `config.max_length`.
        optimizer: "adamw_8bit" or "adamw_torch", for a run that was begun with it. Default: 8 bit on a CUDA card.
        gpus: plan for so many cards like this one, which share each step's examples: all memory figures are per card. Such a plan is
            for the exported script and `accelerate launch`; a notebook trains on one.
        sharded: each card holds a part of the weights (FSDP2) instead of all of them (DDP). By the formula only.

    Raises:
        ConfigError: a setting cannot work with this model or card.
        DoesNotFit: nothing fits; says by how much, and what would.
    """
    config.check()
    if gpu.free_bytes <= 0:
        raise ConfigError(
            f"{gpu.name} reports {gpu.free_bytes} bytes of free memory: close what uses the card, or plan for another one."
        )
    name = model.id if isinstance(model, BaseModel) else model or resolve(config.model)
    shape = model.shape if isinstance(model, BaseModel) else find_shape(name)
    dtype, dtype_reason = compute_dtype(gpu, shape.model_type if shape else find_model_type(name))
    exact = (gpu.kind == "cuda" if exact is None else exact) and not (sharded and gpus > 1) and shape is not None
    if exact and gpu.kind == "cuda" and missing_names():
        gpu = replace(gpu, fused_head="full")
    head, head_reason = loss_head(gpu)
    if gpus > 1:
        _check_sharing(config, gpu, gpus)
    base = Plan(
        name,
        gpu,
        dtype,
        optimizer or ("adamw_8bit" if gpu.kind == "cuda" else "adamw_torch"),
        min(config.max_length, longest_example or 10**9),
        micro_batch=1,
        accumulation=config.effective_batch_size // gpus,
        gpus=gpus,
        sharded=sharded and gpus > 1,
        loss_head=head,
        budget=budget(gpu),
        reasons=[f"calculate in {dtype_reason}", f"attention: {attention(gpu, shape)[1]}", f"loss head: {head_reason}"],
    )
    if shape is None:
        note = "this model's memory is not modeled, so the safest settings are used: micro-batch 1, checkpointing on"
        return replace(base, reasons=[*base.reasons, note])
    _check_against(config, base, shape)

    for seq_len in lengths(base.seq_len):
        for offload in (False, True) if gpu.kind == "cuda" else (False,):
            found = _best_that_fits(config, replace(base, seq_len=seq_len, offload=offload), shape, exact)
            if found is not None:
                found = _plan_evaluation_and_generation(config, found, shape, exact)
                return replace(found, reasons=[*found.reasons, *explain(config, found, base, shape)])
    raise DoesNotFit(suggest_alternatives(config, base, shape))


def _best_that_fits(config: TrainConfig, base: Plan, shape: ModelShape, exact: bool) -> Plan | None:
    """The candidate with the least estimated time that fits. The formula sorts out what cannot; the dry run has the last word."""
    if base.offload:
        modes = CHECKPOINTING[-1:]  # without checkpointing, tens of gigabytes would have to wait in host memory
    else:
        modes = CHECKPOINTING if base.gpu.kind == "cuda" else ("off", "on")
    if config.gradient_checkpointing != "auto":
        modes = [mode for mode in modes if mode == config.gradient_checkpointing]
    candidates = [
        replace(
            base, checkpointing=checkpointing, micro_batch=micro_batch, accumulation=base.accumulation // micro_batch
        )
        for checkpointing in modes
        for micro_batch in _micro_batches(config, base)
    ]
    for plan in sorted(candidates, key=lambda plan: _rough_seconds(config, plan, shape)):
        plan = with_memory(config, plan, shape)
        if plan.memory.total_bytes > plan.budget or (
            plan.offload and _host_bytes(config, plan, shape) > plan.gpu.ram_free_bytes * HOST_SHARE
        ):
            continue
        if exact:
            plan = replace(plan, measured=measure(step_of(config, plan, shape)))
            if plan.peak_bytes > plan.budget:
                continue
        return plan
    return None


def _host_bytes(config: TrainConfig, plan: Plan, shape: ModelShape) -> int:
    """Activations that wait in host memory when the plan offloads them: what would otherwise be saved on the card."""
    return PINNED_ROUNDING * estimate_of(config, replace(plan, offload=False), shape).parts["saved activations"]


def _rough_seconds(config: TrainConfig, plan: Plan, shape: ModelShape) -> float:
    """Seconds of one optimizer step by the formula, to rank candidates. A small micro-batch unpacks the weights more often."""
    flops, bytes_moved = flops_and_bytes(shape, plan.micro_batch, plan.seq_len, plan.checkpointing, config.quantization)
    return plan.accumulation * speed(plan.gpu).seconds(flops, bytes_moved)


def _plan_evaluation_and_generation(config: TrainConfig, plan: Plan, shape: ModelShape, exact: bool) -> Plan:
    """Batches for evaluation and generation that need no more than training does.

    Evaluation is training's forward pass with less kept, so the micro-batch will do. Generation keeps keys and values of every
    layer instead, which can be more than checkpointing keeps: the dry run decides.
    """
    if plan.gpu.kind != "cuda":
        return replace(plan, eval_batch=plan.micro_batch, generation_batch=GENERATION_BATCH)
    if not exact:
        return replace(plan, eval_batch=plan.micro_batch, generation_batch=1)
    batch = GENERATION_BATCH
    while batch > 1 and measure(step_of(config, plan, shape, "generate", batch)).reserved > plan.measured.reserved:
        batch = (batch + 1) // 2
    return replace(plan, eval_batch=plan.micro_batch, generation_batch=batch)


# ---------------------------------------------------------------------------------------------------- limits, checks


def _micro_batches(config: TrainConfig, base: Plan) -> list[int]:
    """Divisors of one card's share of a step, largest first; only the one that the config fixes, if it fixes one."""
    share = base.accumulation  # of a plan with micro-batch 1
    if config.micro_batch_size:
        return [gcd(config.micro_batch_size, share)]
    largest = share if base.gpu.kind == "cuda" else CPU_MICRO_BATCH
    return [d for d in range(min(largest, share), 0, -1) if share % d == 0]


def _check_sharing(config: TrainConfig, gpu: Gpu, gpus: int) -> None:
    if gpu.kind != "cuda":
        raise ConfigError(
            f"gpus={gpus} is for CUDA cards, and this is {gpu.name}: plan for one, or for a card of `KNOWN_GPUS`."
        )
    if config.effective_batch_size % gpus:
        raise ConfigError(
            f"effective_batch_size={config.effective_batch_size} cannot be shared equally among {gpus} GPUs: take a multiple of {gpus}."
        )


def _check_against(config: TrainConfig, plan: Plan, shape: ModelShape) -> None:
    if config.max_length > shape.max_position_embeddings:
        raise ConfigError(
            f"max_length={config.max_length} is longer than the {shape.max_position_embeddings} tokens that "
            f"{plan.model} can read; lower it."
        )
    try:
        shape.lora_parameters(config.r, config.target_modules)
    except ValueError as error:
        raise ConfigError(f"target_modules: {error}") from None
    layers = shape.linear_layers()
    names = layers if config.target_modules == "all-linear" else config.target_modules
    narrowest = min(names, key=lambda name: min(layers[name]))
    if config.r > min(layers[narrowest]):
        raise ConfigError(
            f"r={config.r} is larger than the layer {narrowest} of {plan.model} ({min(layers[narrowest])}); "
            "a rank of 8 to 64 is usual."
        )
    if plan.gpu.kind == "cuda":
        # Weights arrive one tensor at a time and leave for the card; the largest, the embedding, is the most that RAM must hold. Each
        # card has a process of its own. Those that share the weights (FSDP2) first load all of them into RAM.
        loading = plan.gpus * (LOADING_BYTES + 2 * shape.vocab_size * shape.hidden_size)
        if plan.sharded:
            loading += plan.gpus * (nf4_bytes(shape.linear_parameters()) + 2 * shape.other_parameters())
        if loading > plan.gpu.ram_free_bytes:
            raise DoesNotFit(
                f"Loading {plan.model} takes about {loading / GIB:.1f} GiB of RAM, and {plan.gpu.ram_free_bytes / GIB:.1f} GiB are free. "
                "Close other programs or restart the runtime."
            )

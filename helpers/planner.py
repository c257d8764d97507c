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
from helpers.plan import Plan, budget, estimate_of, explain, lengths, step_of, suggest_alternatives, with_memory
from helpers.registry import BaseModel, ModelShape, find_model_type, find_shape, resolve

CHECKPOINTING = ("off", "selective", "on")
# A CPU gains nothing from a larger micro-batch (2, 4 and 8 trained equally fast on two cores) and pays for it in memory.
CPU_MICRO_BATCH = 2
CPU_LOSS_TILE = (
    4096  # vocabulary entries: small enough for a CPU's cache, so that 4 x 128 tokens took an eighth less time
)
GENERATION_BATCH = 48  # prompts at a time: one pass over the weights serves all of them
LOADING_BYTES = 1.5 * GIB  # of RAM, beside the largest tensor, to load a model in NF4 (a 1.1B model took 1.41 GiB)
HOST_SHARE = 0.8  # of the free RAM may hold activations
PINNED_ROUNDING = 2  # host buffers that a card can reach are rounded up to powers of two: at most twice the bytes


class DoesNotFit(RuntimeError):
    """Nothing fits the card. The message says by how much, and what would fit."""


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
    _check_cards(config, gpu, gpus)
    name = model.id if isinstance(model, BaseModel) else model or resolve(config.model)
    shape = model.shape if isinstance(model, BaseModel) else find_shape(name)
    cuda, sharded = gpu.kind == "cuda", sharded and gpus > 1
    exact = (cuda if exact is None else exact) and not sharded and shape is not None
    if exact and cuda and missing_names():
        gpu = replace(gpu, fused_head="full")
    dtype, why_dtype = compute_dtype(gpu, shape.model_type if shape else find_model_type(name))
    head, why_head = loss_head(gpu)
    wanted = Plan(
        name,
        gpu,
        dtype,
        optimizer or ("adamw_8bit" if cuda else "adamw_torch"),
        seq_len=min(config.max_length, longest_example or config.max_length),
        micro_batch=1,
        accumulation=config.effective_batch_size // gpus,
        gpus=gpus,
        sharded=sharded,
        loss_head=head,
        loss_tile=Plan.loss_tile if cuda else CPU_LOSS_TILE,
        budget=budget(gpu),
        reasons=[f"calculate in {why_dtype}", f"attention: {attention(gpu, shape)[1]}", f"loss head: {why_head}"],
    )
    if shape is None:
        note = "this model's memory is not modeled, so the safest settings are used: micro-batch 1, checkpointing on"
        return replace(wanted, reasons=[*wanted.reasons, note])
    _check_model(config, wanted, shape)
    return _search(config, wanted, shape, exact)


# ------------------------------------------------------------------------------------------------ the search


def _search(config: TrainConfig, wanted: Plan, shape: ModelShape, exact: bool) -> Plan:
    """The first that fits: in device memory or with host memory, at the wanted length or a shorter one."""
    for seq_len in lengths(wanted.seq_len):
        for offload in (False, True) if wanted.gpu.kind == "cuda" else (False,):
            plan = _best_that_fits(config, replace(wanted, seq_len=seq_len, offload=offload), shape, exact)
            if plan is not None:
                plan = _plan_evaluation_and_generation(config, plan, shape, exact)
                return replace(plan, reasons=[*plan.reasons, *explain(config, plan, wanted, shape)])
    raise DoesNotFit(suggest_alternatives(config, wanted, shape))


def _best_that_fits(config: TrainConfig, base: Plan, shape: ModelShape, exact: bool) -> Plan | None:
    """The candidate with the least estimated time that fits. The formula sorts out what cannot; the dry run has the last word."""
    modes: tuple[str, ...] = CHECKPOINTING if base.gpu.kind == "cuda" else ("off", "on")
    if base.offload:
        modes = ("on",)  # without checkpointing, tens of gigabytes would have to wait in host memory
    candidates = [
        replace(base, checkpointing=mode, micro_batch=size, accumulation=base.accumulation // size)
        for mode in modes
        if config.gradient_checkpointing in ("auto", mode)
        for size in _micro_batches(config, base)
    ]
    for plan in sorted(candidates, key=lambda plan: _rough_seconds(config, plan, shape)):
        plan = with_memory(config, plan, shape)
        if not plan.fits or (plan.offload and _host_bytes(config, plan, shape) > plan.gpu.ram_free_bytes * HOST_SHARE):
            continue
        if exact:
            plan = replace(plan, measured=measure(step_of(config, plan, shape)))
        if plan.fits:
            return plan
    return None


def _micro_batches(config: TrainConfig, base: Plan) -> list[int]:
    """Divisors of one card's share of a step, largest first; only the one that the config fixes, if it fixes one."""
    share = base.accumulation  # of a plan with micro-batch 1
    if config.micro_batch_size:
        return [gcd(config.micro_batch_size, share)]
    largest = share if base.gpu.kind == "cuda" else min(share, CPU_MICRO_BATCH)
    return [size for size in range(largest, 0, -1) if share % size == 0]


def _rough_seconds(config: TrainConfig, plan: Plan, shape: ModelShape) -> float:
    """Seconds of one optimizer step by the formula, to rank candidates. A small micro-batch unpacks the weights more often."""
    flops, bytes_moved = flops_and_bytes(shape, plan.micro_batch, plan.seq_len, plan.checkpointing, config.quantization)
    return plan.accumulation * speed(plan.gpu).seconds(flops, bytes_moved)


def _host_bytes(config: TrainConfig, plan: Plan, shape: ModelShape) -> int:
    """Activations that wait in host memory when the plan offloads them: what would otherwise be saved on the card."""
    return PINNED_ROUNDING * estimate_of(config, replace(plan, offload=False), shape).parts["saved activations"]


def _plan_evaluation_and_generation(config: TrainConfig, plan: Plan, shape: ModelShape, exact: bool) -> Plan:
    """Batches for evaluation and generation that need no more than training does.

    Evaluation is training's forward pass with less kept, so the micro-batch will do. Generation keeps keys and values of every
    layer instead, which can be more than checkpointing keeps: the dry run decides.
    """
    cuda, batch = plan.gpu.kind == "cuda", GENERATION_BATCH
    if not (cuda and exact and plan.measured):
        return replace(plan, eval_batch=plan.micro_batch, generation_batch=1 if cuda else batch)
    while batch > 1 and measure(step_of(config, plan, shape, "generate", batch)).reserved > plan.measured.reserved:
        batch = (batch + 1) // 2
    return replace(plan, eval_batch=plan.micro_batch, generation_batch=batch)


# ------------------------------------------------------------------------------------------------ what cannot work


def _check_cards(config: TrainConfig, gpu: Gpu, gpus: int) -> None:
    batch = config.effective_batch_size
    if gpu.free_bytes <= 0:
        free = f"{gpu.free_bytes} bytes of free memory"
        raise ConfigError(f"{gpu.name} reports {free}: close what uses the card, or plan for another one.")
    if gpus > 1 and gpu.kind != "cuda":
        one = "plan for one, or for a card of `KNOWN_GPUS`"
        raise ConfigError(f"gpus={gpus} is for CUDA cards, and this is {gpu.name}: {one}.")
    if batch % gpus:
        shared = f"cannot be shared equally among {gpus} GPUs"
        raise ConfigError(f"effective_batch_size={batch} {shared}: take a multiple of {gpus}.")


def _check_model(config: TrainConfig, plan: Plan, shape: ModelShape) -> None:
    longest = shape.max_position_embeddings
    if config.max_length > longest:
        can_read = f"the {longest} tokens that {plan.model} can read"
        raise ConfigError(f"max_length={config.max_length} is longer than {can_read}; lower it.")
    try:
        layers = shape.adapted_layers(config.target_modules)
    except ValueError as error:
        raise ConfigError(f"target_modules: {error}") from None
    narrowest = min(layers, key=lambda name: min(layers[name]))
    width = min(layers[narrowest])
    if config.r > width:
        layer = f"the layer {narrowest} of {plan.model} ({width})"
        raise ConfigError(f"r={config.r} is larger than {layer}; a rank of 8 to 64 is usual.")
    if plan.gpu.kind == "cuda":
        _check_ram(plan, shape)


def _check_ram(plan: Plan, shape: ModelShape) -> None:
    # Weights arrive one tensor at a time and leave for the card; the largest, the embedding, is the most that RAM must hold. Each
    # card has a process of its own. Those that share the weights (FSDP2) first load all of them into RAM.
    loading = LOADING_BYTES + 2 * shape.vocab_size * shape.hidden_size
    if plan.sharded:
        loading += nf4_bytes(shape.linear_parameters()) + 2 * shape.other_parameters()
    needed, free = plan.gpus * loading / GIB, plan.gpu.ram_free_bytes / GIB
    if needed > free:
        takes = f"Loading {plan.model} takes about {needed:.1f} GiB of RAM, and {free:.1f} GiB are free."
        raise DoesNotFit(f"{takes} Close other programs or restart the runtime.")

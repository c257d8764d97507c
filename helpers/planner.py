"""The fastest settings that fit this card, for training, evaluation and generation, each with its reason.

    plan = make_plan(config, detect_gpu(), lengths=lengths)     # tokens of each example, once the data are loaded
    print(plan)                     # every choice, line by line

The effective batch is kept exactly. How its examples are cut into micro-batches is decided anew in each step (`helpers.cutting`), by what
each mode of checkpointing has room for (`helpers.modes`). The formula (`helpers.memory`) tells that instantly; on a CUDA card, dry runs
(`helpers.dryrun`) settle it. Only where nothing else fits do activations wait in host memory, and only then examples get shorter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import gcd

from helpers.config import ConfigError, TrainConfig
from helpers.cutting import Mode
from helpers.dryrun import measure_once, missing_names
from helpers.hardware import GIB, Gpu, attention, compute_dtype, loss_head
from helpers.memory import nf4_bytes
from helpers.modes import evaluation_mode, modes_that_fit
from helpers.plan import Plan, budget, explain, shorter, step_of, suggest_alternatives, with_cut, with_memory
from helpers.registry import BaseModel, ModelShape, find_model_type, find_shape, resolve

CPU_LOSS_TILE = 4096  # vocabulary entries: small enough for a CPU's cache, so that a step took an eighth less time
GENERATION_BATCH = 48  # prompts at a time: one pass over the weights serves all of them
LOADING_BYTES = 1.5 * GIB  # of RAM, beside the largest tensor, to load a model in NF4 (a 1.1B model took 1.41 GiB)


class DoesNotFit(RuntimeError):
    """Nothing fits the card. The message says by how much, and what would fit."""


def make_plan(
    config: TrainConfig,
    gpu: Gpu,
    model: str | BaseModel = "",
    *,
    exact: bool | None = None,
    lengths: Sequence[int] | None = None,
    optimizer: str = "",
    gpus: int = 1,
    sharded: bool = False,
) -> Plan:
    """The fastest settings that fit `gpu`, with the effective batch of `config` kept exactly.

    Args:
        model: what `choose_model` answered: a row of the menu, a Hub id or a folder. Default: `config.model`.
        exact: let the dry run decide (seconds) instead of the formula alone (instant). Default: on a CUDA card.
        lengths: tokens of each training example. Default: all are as long as `config.max_length` allows.
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
        seq_len=min(config.max_length, max(lengths or [config.max_length])),
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
    return _search(config, wanted, shape, exact, lengths)


# ------------------------------------------------------------------------------------------------ the search


def _search(config: TrainConfig, wanted: Plan, shape: ModelShape, exact: bool, lengths: Sequence[int] | None) -> Plan:
    """The first that fits, at the wanted length or a shorter one."""
    for seq_len in shorter(wanted.seq_len):
        base = _with_tile(config, replace(wanted, seq_len=seq_len), shape)
        found = modes_that_fit(config, base, shape, exact)
        modes = tuple(mode for mode, _ in found)
        plan = _cut_equally(config, base, shape, exact, modes, lengths)
        if plan is None:
            continue
        if plan.gpus == 1 and plan.gpu.kind == "cuda":
            if not config.micro_batch_size:
                plan = replace(plan, modes=modes, largest_bytes=max(size for _, size in found))
            plan = replace(plan, eval_mode=evaluation_mode(config, base, shape, exact, modes[0]))
        if plan.gpus == 1:
            plan = with_cut(config, plan, lengths)
        plan = replace(plan, eval_batch=plan.micro_batch, generation_batch=_generation_batch(config, plan, shape))
        return replace(plan, reasons=[*plan.reasons, *explain(config, plan, wanted, shape)])
    raise DoesNotFit(suggest_alternatives(config, wanted, shape))


def _with_tile(config: TrainConfig, base: Plan, shape: ModelShape) -> Plan:
    """A smaller loss tile where the loss head's temporaries would be the peak of a whole step at once: then they are of a smaller one too."""
    whole = replace(base, micro_batch=base.accumulation, checkpointing="on")
    return replace(base, loss_tile=with_memory(config, whole, shape).loss_tile)


def _cut_equally(
    config: TrainConfig,
    base: Plan,
    shape: ModelShape,
    exact: bool,
    modes: Sequence[Mode],
    lengths: Sequence[int] | None,
) -> Plan | None:
    """The quickest plan with equal micro-batches that fit whatever the lengths of their examples."""
    share = base.accumulation  # examples of one card in a step: of a plan with micro-batch 1
    known = lengths if lengths and base.gpu.kind == "cuda" else [base.seq_len]
    ordered = sorted(min(length, base.seq_len) for length in known)[:: -(-len(known) // 1000)]  # a thousand say enough

    def seconds(option: tuple[Mode, int]) -> float:
        size, number = option[1], len(ordered)
        # The longest of some examples drawn at random is at most the i-th longest of all with a chance of (i / all)^some.
        chances = [((i + 1) / number) ** size - (i / number) ** size for i in range(number)]
        longest = sum(chance * length for chance, length in zip(chances, ordered))
        return share / size * option[0].seconds(size, round(longest))

    sizes = [gcd(config.micro_batch_size, share)] if config.micro_batch_size else range(share, 0, -1)
    options = [(mode, n) for mode in modes for n in sizes if share % n == 0 and n <= mode.most_examples(base.seq_len)]
    for mode, size in sorted(options, key=seconds):
        plan = replace(base, checkpointing=mode.checkpointing, offload=mode.offload)
        plan = with_memory(config, replace(plan, micro_batch=size, accumulation=share // size), shape)
        if exact:
            plan = replace(plan, measured=measure_once(step_of(config, plan, shape)))
        if plan.fits:
            return plan
    return None


def _generation_batch(config: TrainConfig, plan: Plan, shape: ModelShape) -> int:
    """How many prompts at once need no more than training does: keys and values of every layer are kept, for each of them."""
    if plan.gpu.kind != "cuda" or plan.measured is None:
        return 1 if plan.gpu.kind == "cuda" else GENERATION_BATCH
    batch, limit = GENERATION_BATCH, plan.peak_bytes or 0
    while batch > 1:
        run = measure_once(step_of(config, plan, shape, "generate", batch))
        needed = replace(plan, measured=run, largest_bytes=0).peak_bytes or 0
        if needed <= limit:
            break
        each = (run.reserved - run.resident) / batch
        batch = max(1, min(batch - 1, int(batch - (needed - limit) / each)))
    return batch


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

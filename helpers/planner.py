"""The fastest settings that fit this card, for training, evaluation and generation, each with its reason.

    plan = make_plan(config, detect_gpu())
    print(plan)                     # every choice, line by line

The effective batch is kept exactly: micro-batch x accumulation. The formula (`helpers.memory`) ranks what may fit, instantly; on a
CUDA card the dry run (`helpers.dryrun`) decides. Among what fits, the least work per example wins: checkpointing off, then
selective, then on; only then activations wait in host memory, and only then examples get shorter.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from math import ceil

from helpers.catalog import CATALOG, BaseModel, ModelShape, find_shape, resolve
from helpers.config import ConfigError, TrainConfig
from helpers.dryrun import DryRun, Step, dry_run
from helpers.hardware import GIB, MIB, Gpu, attention, compute_dtype, loss_head, speed
from helpers.memory import ADAMW_8BIT, CUDA_CONTEXT, MemoryEstimate, estimate, work

RESERVE_SHARE, RESERVE_BYTES = 0.03, 200 * MIB  # kept free: what a driver, a desktop or the next kernel may want
# A CPU gains nothing from a larger micro-batch (2, 4 and 8 trained equally fast on two cores) and pays for it in memory.
CPU_MICRO_BATCH = 2
LOADING_BYTES = 1.5 * GIB  # RAM that loading a model in NF4 took beside its largest tensor (1.1B model: 1.41 GiB at the peak)
HOST_SHARE = 0.8  # of the free RAM may hold activations
CPU_GENERATION_BATCH = 48  # one pass over the weights serves all of them, and RAM is plenty
SHORTEST_SEQUENCE = 128
CLEARLY_LESS = 0.9  # of what has just failed
CHECKPOINTING = ("off", "selective", "on")
SMALL_TILE = 4096  # vocabulary entries per tile of TRL's torch loss head, where its temporaries would be the peak


class DoesNotFit(RuntimeError):
    """Nothing fits the card. The message says by how much, and what would fit."""


@dataclass(frozen=True)
class Plan:
    """How a config will be trained on one card. Sizes in bytes."""

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
    budget: int = 0
    memory: MemoryEstimate | None = None
    """The formula's parts; None where the model is not modelled."""
    measured: DryRun | None = None
    """The dry run that decided; None where the formula did."""
    reasons: list[str] = field(default_factory=list)

    @property
    def peak_bytes(self) -> int | None:
        """What the card has to give: reserved by the dry run plus the CUDA context, or the formula's total."""
        if self.measured is not None:
            return self.measured.reserved + CUDA_CONTEXT
        return self.memory.total_bytes if self.memory else None

    @property
    def seconds_per_step(self) -> float | None:
        """About how long one optimizer step takes, from the dry run's counted work; None where this card's speed is unknown."""
        rate = speed(self.gpu)
        if self.measured is None or not rate.source:
            return None
        return self.accumulation * rate.seconds(self.measured.flops, self.measured.bytes_moved)

    def __str__(self) -> str:
        return "\n".join(f"- {reason}" for reason in self.reasons)


# ------------------------------------------------------------------------------------------------------- the plan


def make_plan(
    config: TrainConfig, gpu: Gpu, model: str | BaseModel = "", *, exact: bool | None = None, longest_example: int | None = None
) -> Plan:
    """The fastest settings that fit `gpu`, with the effective batch of `config` kept exactly.

    Args:
        model: what `choose_model` answered: a row of the menu, a Hub id or a folder. Default: `config.model`.
        exact: let the dry run decide (seconds) instead of the formula alone (instant). Default: on a CUDA card.
        longest_example: tokens of the longest example, if it is shorter than `config.max_length`.

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
    dtype, dtype_reason = compute_dtype(gpu, shape)
    head, head_reason = loss_head(gpu)
    base = Plan(
        name, gpu, dtype, "adamw_8bit" if gpu.kind == "cuda" else "adamw_torch", min(config.max_length, longest_example or 10**9),
        micro_batch=1, accumulation=config.effective_batch_size, loss_head=head, budget=budget(gpu),
        reasons=[f"calculate in {dtype_reason}", f"attention: {attention(gpu, shape)[1]}", f"loss head: {head_reason}"],
    )  # fmt: skip
    if shape is None:
        note = "this model's memory is not modelled, so the safest settings are used: micro-batch 1, checkpointing on"
        return replace(base, reasons=[*base.reasons, note])
    _check_against(config, base, shape)
    exact = gpu.kind == "cuda" if exact is None else exact

    for seq_len in _lengths(base.seq_len):
        for offload in (False, True) if gpu.kind == "cuda" else (False,):
            found = _best_that_fits(config, replace(base, seq_len=seq_len, offload=offload), shape, exact)
            if found is not None:
                found = _plan_evaluation_and_generation(config, found, shape, exact)
                return replace(found, reasons=[*found.reasons, *_explain(config, found, base, shape)])
    raise DoesNotFit(what_would_fit(config, base, shape))


def _best_that_fits(config: TrainConfig, base: Plan, shape: ModelShape, exact: bool) -> Plan | None:
    """The candidate with the least estimated time that fits. The formula sorts out what cannot; the dry run has the last word."""
    if base.offload:
        modes = CHECKPOINTING[-1:]  # without checkpointing, tens of gigabytes would have to wait in host memory
    else:
        modes = CHECKPOINTING if base.gpu.kind == "cuda" else ("off", "on")
    if config.gradient_checkpointing != "auto":
        modes = [mode for mode in modes if mode == config.gradient_checkpointing]
    candidates = [
        replace(base, checkpointing=checkpointing, micro_batch=micro_batch, accumulation=config.effective_batch_size // micro_batch)
        for checkpointing in modes
        for micro_batch in _micro_batches(config, base.gpu)
    ]
    for plan in sorted(candidates, key=lambda plan: _rough_seconds(config, plan, shape)):
        plan = _with_memory(config, plan, shape)
        if plan.memory.total_bytes > plan.budget or (
            plan.offload and _host_bytes(config, plan, shape) > plan.gpu.ram_free_bytes * HOST_SHARE
        ):
            continue
        if exact:
            plan = replace(plan, measured=dry_run(step_of(config, plan, shape)))
            if plan.peak_bytes > plan.budget:
                continue
        return plan
    return None


def _host_bytes(config: TrainConfig, plan: Plan, shape: ModelShape) -> int:
    """Activations that wait in host memory when the plan offloads them: what would otherwise be saved on the card."""
    return _estimate(config, replace(plan, offload=False), shape).parts["saved activations"]


def _rough_seconds(config: TrainConfig, plan: Plan, shape: ModelShape) -> float:
    """Seconds of one optimizer step by the formula, to rank candidates. A small micro-batch unpacks the weights more often."""
    flops, bytes_moved = work(shape, plan.micro_batch, plan.seq_len, plan.checkpointing, config.quantization)
    return plan.accumulation * speed(plan.gpu).seconds(flops, bytes_moved)


def _with_memory(config: TrainConfig, plan: Plan, shape: ModelShape) -> Plan:
    """`plan` with the formula's estimate, and with a smaller loss tile where the loss head's temporaries would be the peak."""
    for tile in (plan.loss_tile, SMALL_TILE):
        memory = _estimate(config, replace(plan, loss_tile=tile), shape)
        if plan.loss_head != "torch" or memory.peak_moment != "computing the loss" or plan.gpu.kind != "cuda":
            break
    return replace(plan, memory=memory, loss_tile=tile)


def _estimate(config: TrainConfig, plan: Plan, shape: ModelShape) -> MemoryEstimate:
    on_gpu = plan.gpu.kind == "cuda"
    return estimate(
        shape, plan.micro_batch, plan.seq_len, r=config.r, target_modules=config.target_modules, checkpointing=plan.checkpointing,
        quantization=config.quantization, element_bytes=2 if on_gpu else 4, optimizer_bytes=ADAMW_8BIT if on_gpu else 8,
        attention=attention(plan.gpu, shape)[0], loss_head=plan.loss_head, loss_tile=plan.loss_tile, offload=plan.offload, on_gpu=on_gpu,
    )  # fmt: skip


def step_of(config: TrainConfig, plan: Plan, shape: ModelShape, phase: str = "train", micro_batch: int = 0) -> Step:
    """The step that this plan will run, for the dry run. Micro-batches above one are padded, so attention gets a mask."""
    micro_batch = micro_batch or plan.micro_batch
    return Step(
        model=shape.to_config(), micro_batch=micro_batch, seq_len=plan.seq_len, phase=phase, r=config.r,
        target_modules=config.target_modules, lora_dropout=config.lora_dropout, quantization=config.quantization, dtype=plan.dtype,
        checkpointing=plan.checkpointing, offload=plan.offload, attention=attention(plan.gpu, shape)[0], masked=micro_batch > 1,
        loss_head=plan.loss_head, loss_tile=plan.loss_tile, optimizer=plan.optimizer, load_in=plan.dtype,
    )  # fmt: skip


def _plan_evaluation_and_generation(config: TrainConfig, plan: Plan, shape: ModelShape, exact: bool) -> Plan:
    """Batches for evaluation and generation that need no more than training does.

    Evaluation is training's forward pass with less kept, so the micro-batch will do. Generation keeps keys and values of every
    layer instead, which can be more than checkpointing keeps: the dry run decides.
    """
    if plan.gpu.kind != "cuda":
        return replace(plan, eval_batch=plan.micro_batch, generation_batch=CPU_GENERATION_BATCH)
    if not exact:
        return replace(plan, eval_batch=plan.micro_batch, generation_batch=1)
    batch = plan.micro_batch
    while batch > 1 and dry_run(step_of(config, plan, shape, "generate", batch)).allocated > plan.measured.allocated:
        batch = (batch + 1) // 2
    return replace(plan, eval_batch=plan.micro_batch, generation_batch=batch)


# ---------------------------------------------------------------------------------------------------- limits, checks


def budget(gpu: Gpu) -> int:
    """Bytes that a plan may use on this card: what is free, less a reserve for what others take meanwhile."""
    return int(gpu.free_bytes - max(RESERVE_SHARE * gpu.free_bytes, RESERVE_BYTES))


def _lengths(longest: int) -> Iterator[int]:
    """The wanted length, then shorter ones: three quarters, a half, ... down to 128 tokens."""
    yield longest
    length = longest
    while length * 3 // 4 >= SHORTEST_SEQUENCE:
        length = length * 3 // 4
        yield length // 8 * 8


def _micro_batches(config: TrainConfig, gpu: Gpu) -> list[int]:
    """Divisors of the effective batch, largest first; only the one that the config fixes, if it fixes one."""
    if config.micro_batch_size:
        return [config.micro_batch_size]
    largest = config.effective_batch_size if gpu.kind == "cuda" else CPU_MICRO_BATCH
    return [d for d in range(min(largest, config.effective_batch_size), 0, -1) if config.effective_batch_size % d == 0]


def _check_against(config: TrainConfig, plan: Plan, shape: ModelShape) -> None:
    if config.max_length > shape.max_position_embeddings:
        raise ConfigError(f"max_length={config.max_length} is longer than the {shape.max_position_embeddings} tokens that "
                          f"{plan.model} can read; lower it.")  # fmt: skip
    try:
        shape.lora_parameters(config.r, config.target_modules)
    except ValueError as error:
        raise ConfigError(f"target_modules: {error}") from None
    layers = shape.linear_layers()
    names = layers if config.target_modules == "all-linear" else config.target_modules
    narrowest = min(names, key=lambda name: min(layers[name]))
    if config.r > min(layers[narrowest]):
        raise ConfigError(f"r={config.r} is larger than the layer {narrowest} of {plan.model} ({min(layers[narrowest])}); "
                          "a rank of 8 to 64 is usual.")  # fmt: skip
    if plan.gpu.kind == "cuda" and plan.model in {row.id for row in CATALOG.values()}:
        # Weights arrive one tensor at a time and leave for the card; the largest, the embedding, is the most that RAM must hold.
        loading = LOADING_BYTES + 2 * shape.vocab_size * shape.hidden_size
        if loading > plan.gpu.ram_free_bytes:
            raise DoesNotFit(
                f"Loading {plan.model} takes about {loading / GIB:.1f} GiB of RAM, and {plan.gpu.ram_free_bytes / GIB:.1f} GiB are free. "
                "Close other programs or restart the runtime."
            )
        download = 2 * shape.parameters()
        if download > plan.gpu.disk_free_bytes:
            raise DoesNotFit(
                f"{plan.model}: a download of {download / GIB:.1f} GiB, and the disk has {plan.gpu.disk_free_bytes / GIB:.1f} GiB "
                "free. Free some space or choose a smaller model."
            )


# -------------------------------------------------------------------------------------------------------- in words


def _explain(config: TrainConfig, plan: Plan, base: Plan, shape: ModelShape) -> list[str]:
    gib = plan.budget / GIB
    lines = [f"micro-batch {plan.micro_batch} x {plan.accumulation} accumulation = {config.effective_batch_size} examples per step"]
    if plan.gpu.kind != "cuda":
        lines[0] += "; a larger micro-batch is no faster without a GPU"
    if config.gradient_checkpointing != "auto":
        lines.append(f"checkpointing {plan.checkpointing}: the config says so")
    elif plan.checkpointing == "off":
        lines.append("checkpointing off: it would save memory that is not needed, and cost time")
    else:
        without = _estimate(config, replace(plan, checkpointing="off", micro_batch=1), shape).total_bytes
        kept = ", keeping attention's output" if plan.checkpointing == "selective" else ""
        if without > plan.budget:
            why = f"off would need {without / GIB:.1f} GiB with micro-batch 1, you have {gib:.1f}"
        else:
            why = f"micro-batch {plan.micro_batch} with it is quicker than the smaller one that fits without"
        lines.append(f"checkpointing on{kept}: {why}")
    if plan.offload:
        lines.append("activations wait in host memory: without that nothing fits at this length")
    if plan.seq_len < base.seq_len:
        lines.append(f"at most {plan.seq_len} tokens per example: {base.seq_len} do not fit; longer examples would be cut")
    if plan.loss_tile < base.loss_tile:
        lines.append(f"loss computed in tiles of {plan.loss_tile} vocabulary entries, because larger ones would be the peak")
    sign = "=" if plan.measured else "about"
    lines.append(
        f"peak {sign} {plan.peak_bytes / GIB:.1f} GiB of the {gib:.1f} GiB that may be used ({plan.gpu.free_bytes / GIB:.1f} free)"
    )
    if plan.measured:
        lines.append(
            f"evaluation in batches of {plan.eval_batch}, generation in batches of {plan.generation_batch}: neither needs more"
        )
    if plan.seconds_per_step is not None:
        lines.append(f"about {plan.seconds_per_step:.1f} s per step, {speed(plan.gpu).source}")
    return lines


def what_would_fit(config: TrainConfig, base: Plan, shape: ModelShape | None = None) -> str:
    """The sentence for `DoesNotFit`: by how much, and the nearest smaller model, shorter sequence and lower rank that would."""
    shape = shape or find_shape(base.model)
    if shape is None:
        return f"{base.model} does not fit {base.gpu.name} even with micro-batch 1. Use a smaller model, max_length or r."

    def need(of_config: TrainConfig, of_plan: Plan, of_shape: ModelShape) -> int:
        return _with_memory(of_config, replace(of_plan, micro_batch=1, checkpointing="on"), of_shape).memory.total_bytes

    wanted, budget = need(config, base, shape), base.budget
    too_much = f"{base.gpu.name} has {budget / GIB:.1f} GiB to give, {ceil((wanted - budget) / MIB)} MiB too little"
    if wanted <= budget:  # it did not fit although it should have
        budget = int(wanted * CLEARLY_LESS)
        too_much = f"{base.gpu.name} had {base.budget / GIB:.1f} GiB to give, and yet it ran out: something else uses its memory"
    smaller = [
        row for row in CATALOG.values() if row.shape.parameters() < shape.parameters() and config.target_modules == "all-linear"
    ]
    options = [(f"model={row.short_name!r}", need(config, base, row.shape)) for row in reversed(smaller)]
    shorter = [(f"max_length={length}", need(config, replace(base, seq_len=length), shape)) for length in _lengths(base.seq_len)]
    lower = [(f"r={r}", need(replace(config, r=r), base, shape)) for r in (64, 32, 16, 8, 4) if r < config.r]
    nearest = [next((option for option in kind if option[1] <= budget), None) for kind in (options, shorter, lower)]
    fitting = [f"{change} ({size / GIB:.1f} GiB)" for change, size in filter(None, nearest)]
    return (
        f"{base.model} needs {wanted / GIB:.1f} GiB even with micro-batch 1, {base.seq_len} tokens and checkpointing; {too_much}. "
        + (f"This would fit: {'; '.join(fitting)}." if fitting else "Nothing on the menu fits: use a card with more memory.")
    )

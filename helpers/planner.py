"""The settings that fit this card: micro-batch, accumulation and checkpointing, each with its reason.

    plan = make_plan(config, detect_gpu())
    print(plan)                     # every choice, line by line

The effective batch is kept exactly: micro-batch x accumulation. Checkpointing stays off when that fits, because recomputing
activations costs time; among what fits, the largest micro-batch wins, because it keeps the card busy.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from helpers.catalog import CATALOG, BaseModel, ModelShape, resolve
from helpers.config import TrainConfig
from helpers.hardware import GIB, Gpu, attention, compute_dtype
from helpers.memory import MemoryEstimate, estimate
from helpers.weights import EMBEDDED_MODEL

# Kept free: the allocator's gaps (recorded T4 runs reserved up to a quarter more than they allocated; the median was a tenth).
MARGIN = 0.12
# A CPU gains nothing from a larger micro-batch (1, 2, 4 and 8 trained equally fast on two cores) and pays for it in memory.
CPU_MICRO_BATCH = 2
# What "auto" tries on a GPU, best first. All are ungated and Apache-2.0 according to their cards at the time of writing.
AUTO_MODELS = ["SmolLM3-3B", "Qwen2.5-1.5B-Instruct", "Qwen2.5-0.5B-Instruct"]


class DoesNotFit(RuntimeError):
    """Nothing fits the card. The message says by how much, and what would."""


@dataclass(frozen=True)
class Plan:
    """How a config will be trained on one card."""

    model: str
    gpu: Gpu
    micro_batch: int
    accumulation: int
    checkpointing: bool
    dtype: str
    optimizer: str
    memory: MemoryEstimate | None
    reasons: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return "\n".join(f"- {reason}" for reason in self.reasons)


def choose_model(config: TrainConfig, gpu: Gpu, hub_reachable: bool) -> tuple[str, str]:
    """(Hub id or folder to train, why). "auto" takes the best ungated model of the menu that fits, or the embedded one."""
    if config.model != "auto":
        return resolve(config.model), "chosen in the config"
    if gpu.kind != "cuda":
        return EMBEDDED_MODEL, "the embedded 135M model, because there is no CUDA GPU"
    if not hub_reachable:
        return EMBEDDED_MODEL, "the embedded 135M model, because the Hugging Face Hub does not answer"
    for name in AUTO_MODELS:
        try:
            make_plan(config, gpu, model=CATALOG[name])
            return CATALOG[name].id, "the largest ungated model of the 1-3B menu that fits this card"
        except DoesNotFit:
            continue
    return EMBEDDED_MODEL, "the embedded 135M model, because nothing larger fits this card"


def make_plan(config: TrainConfig, gpu: Gpu, model: str | BaseModel = "") -> Plan:
    """The fastest settings that fit `gpu`, with the effective batch of `config` kept exactly.

    Args:
        model: what `choose_model` answered; a row of the menu, a Hub id or a folder. Default: `config.model`.

    Raises:
        ConfigError: a setting cannot work.
        DoesNotFit: even micro-batch 1 with checkpointing is too big; says by how much.
    """
    config.check()
    name = model.id if isinstance(model, BaseModel) else model or resolve(config.model)
    shape = find_shape(name)
    dtype, dtype_reason = compute_dtype(gpu)
    reasons = [f"calculate in {dtype_reason}", f"attention: {attention(gpu)[1]}"]
    optimizer = "adamw_8bit" if gpu.kind == "cuda" else "adamw_torch"
    if shape is None:
        reasons.append("this model's memory is not modelled, so the safest settings are used: micro-batch 1, checkpointing on")
        return Plan(name, gpu, 1, config.effective_batch_size, True, dtype, optimizer, None, reasons)

    budget = int(gpu.free_bytes * (1 - MARGIN))
    tried: MemoryEstimate | None = None
    for checkpointing in (False, True):
        for micro_batch in _divisors(config.effective_batch_size, CPU_MICRO_BATCH if gpu.kind != "cuda" else None):
            tried = _estimate(config, gpu, shape, micro_batch, checkpointing)
            if tried.total_bytes <= budget:
                reasons += _explain(config, gpu, shape, micro_batch, checkpointing, tried, budget)
                accumulation = config.effective_batch_size // micro_batch
                return Plan(name, gpu, micro_batch, accumulation, checkpointing, dtype, optimizer, tried, reasons)
    raise DoesNotFit(
        f"{name} needs {tried.total_bytes / GIB:.1f} GiB even with micro-batch 1, {config.max_length} tokens and checkpointing; "
        f"{gpu.name} has {budget / GIB:.1f} GiB to give. Choose a smaller model or a shorter max_length."
    )


def find_shape(model: str) -> ModelShape | None:
    """Shape of a menu row, a local folder or a Hub id (reads only config.json); None if it is unknown or not modelled."""
    for row in CATALOG.values():
        if model in (row.id, row.short_name):
            return row.shape
    from transformers import AutoConfig

    try:
        return ModelShape.from_config(AutoConfig.from_pretrained(Path(model) if Path(model).is_dir() else model))
    except (ValueError, OSError):
        return None


def _divisors(number: int, limit: int | None) -> list[int]:
    return [d for d in range(min(number, limit or number), 0, -1) if number % d == 0]


def _estimate(config: TrainConfig, gpu: Gpu, shape: ModelShape, micro_batch: int, checkpointing: bool) -> MemoryEstimate:
    on_gpu = gpu.kind == "cuda"
    return estimate(
        shape, micro_batch, config.max_length, r=config.r, target_modules=config.target_modules, checkpointing=checkpointing,
        quantization=config.quantization, element_bytes=2 if on_gpu else 4, optimizer_bytes=2 * (1 + 4 / 256) if on_gpu else 8,
        on_gpu=on_gpu,
    )  # fmt: skip


def _explain(
    config: TrainConfig, gpu: Gpu, shape: ModelShape, micro_batch: int, checkpointing: bool, chosen: MemoryEstimate, budget: int
) -> list[str]:
    lines = [
        f"micro-batch {micro_batch} x {config.effective_batch_size // micro_batch} accumulation = "
        f"{config.effective_batch_size} examples per step"
    ]
    if gpu.kind != "cuda":
        lines[0] += "; a larger micro-batch is no faster without a GPU"
    if checkpointing:
        without = _estimate(config, gpu, shape, 1, checkpointing=False)
        lines.append(f"checkpointing on: off would need {without.total_bytes / GIB:.1f} GiB even with micro-batch 1")
    else:
        lines.append("checkpointing off: it would save memory that is not needed, and cost time")
    lines.append(
        f"peak about {chosen.total_bytes / GIB:.1f} GiB of the {budget / GIB:.1f} GiB that may be used "
        f"({gpu.free_bytes / GIB:.1f} free, {MARGIN:.0%} kept in reserve)"
    )
    return lines

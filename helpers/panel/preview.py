"""What a config would mean on a card: the plan, its memory, its time, and the share of parameters that learn. No widget, no torch.

    preview = preview_of(config, KNOWN_GPUS["T4"], examples=488)
    preview.plan, preview.problem

Traffic lights: which model of the menu fits the chosen card with the present settings.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache

from helpers import setup
from helpers.config import ConfigError, TrainConfig
from helpers.hardware import KNOWN_GPUS, Gpu, speed
from helpers.memory import MemoryEstimate, flops_and_bytes
from helpers.menu import choose_model, fit_status
from helpers.panel.settings import usable
from helpers.plan import Plan
from helpers.planner import DoesNotFit, make_plan
from helpers.recipe import total_steps
from helpers.registry import BaseModel, ModelShape, find_row, find_shape


@dataclass
class Preview:
    """Everything that the panel's views show of a plan. Sizes in bytes."""

    model: str
    why_model: str
    gpu: Gpu
    shape: ModelShape | None = None
    plan: Plan | None = None  # None where nothing fits or a setting cannot work; then `problem` says why
    problem: str = ""
    memory: MemoryEstimate | None = None  # by the formula; where nothing fits, of the smallest settings
    steps: int | None = None
    seconds: float | None = None  # of the whole training; None where the card's speed or the examples are unknown
    trainable: int | None = None
    light: str = "no"  # or "fits", "tight", "not modeled"


@lru_cache(maxsize=1)
def _hub_reachable() -> bool:
    """Asked once, not with every move of a slider."""
    return setup.hub_reachable()


@lru_cache(maxsize=64)
def _row_of(model: str) -> BaseModel:
    """The model as a row of the menu. A folder or Hub id is looked up once, not with every move of a slider."""
    try:
        return find_row(model) or BaseModel(model, find_shape(model))  # type: ignore[arg-type] # None: not modeled
    except (ImportError, OSError) as error:
        raise ConfigError(f"model={model!r} cannot be read: {error}") from error


def preview_of(config: TrainConfig, gpu: Gpu, examples: int | None = None, exact: bool = False) -> Preview:
    """Plan `config` for `gpu`. Never raises for what a learner can set: the reason is in the answer.

    Args:
        examples: in the data file, before the split; decides how many steps an epoch has.
        exact: let the dry run decide (seconds) instead of the formula (instant).
    """
    wrong, config = config.problems(), usable(config)
    here = gpu.kind == "cuda" and gpu not in KNOWN_GPUS.values()  # a card elsewhere is taken to have a network
    model, why = choose_model(config, gpu, _hub_reachable() if here and config.model == "auto" else True)
    preview = Preview(model, why, gpu)
    if config.max_steps > 0:
        preview.steps = config.max_steps
    elif examples:
        preview.steps = total_steps(config, round(examples * (1 - config.validation_share)))
    try:
        row = _row_of(model)
        preview.shape = row.shape
        if wrong:
            raise ConfigError(" ".join(wrong.values()))
        with suppress(AttributeError, ValueError):  # not modeled; layers that it does not have: the planner says so
            preview.trainable = row.shape.lora_parameters(config.r, config.target_modules)
        _plan(preview, config, row, exact)
    except (DoesNotFit, ValueError) as error:  # a `ConfigError` is a ValueError
        preview.problem = str(error)
    return preview


def _plan(preview: Preview, config: TrainConfig, row: BaseModel, exact: bool) -> None:
    gpu, shape = preview.gpu, row.shape
    try:
        plan = make_plan(config, gpu, row, exact=exact)
    except DoesNotFit:
        boundless = replace(gpu, free_bytes=2**60, ram_free_bytes=2**60)
        smallest = replace(config, micro_batch_size=1, gradient_checkpointing="on")
        preview.memory = make_plan(smallest, boundless, row, exact=False).memory
        raise
    preview.plan, preview.memory = plan, plan.memory
    preview.light = fit_status(config, gpu, row)[0] if shape else "not modeled"
    step_seconds, rate = plan.seconds_per_step, speed(gpu)
    if step_seconds is None and shape and rate.source:
        amount = flops_and_bytes(shape, plan.micro_batch, plan.seq_len, plan.checkpointing, config.quantization)
        step_seconds = plan.accumulation * rate.seconds(*amount)
    if preview.steps and step_seconds:
        preview.seconds = preview.steps * step_seconds

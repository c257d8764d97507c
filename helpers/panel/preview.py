"""What a config would mean on a card: the plan, its memory, its time, and the share of parameters that learn. No widget, no torch.

preview = preview_of(config, KNOWN_GPUS["T4"], examples=488)
preview.plan, preview.problem

Traffic lights: which model of the menu fits the chosen card with the present settings.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from helpers.config import ConfigError, TrainConfig
from helpers.hardware import KNOWN_GPUS, Gpu, attention, compute_dtype, loss_head, speed
from helpers.memory import MemoryEstimate, estimate, flops_and_bytes
from helpers.menu import choose_model, fit_status
from helpers.panel.settings import problems, usable
from helpers.plan import Plan
from helpers.planner import DoesNotFit, make_plan
from helpers.recipe import total_steps
from helpers.registry import CATALOG, BaseModel, ModelShape, find_shape


@dataclass(frozen=True)
class Preview:
    """Everything that the panel's views show of a plan. Sizes in bytes."""

    model: str
    why_model: str
    shape: ModelShape | None
    gpu: Gpu
    plan: Plan | None
    """None where nothing fits or a setting cannot work; then `problem` says why."""
    memory: MemoryEstimate | None
    """By the formula; where nothing fits, of the smallest settings. None if the model is not modeled."""
    problem: str = ""
    steps: int | None = None
    seconds: float | None = None
    """Of the whole training, about; None where the card's speed or the number of examples is unknown."""
    trainable: int | None = None

    @property
    def exact(self) -> bool:
        return self.plan is not None and self.plan.measured is not None

    @property
    def peak_bytes(self) -> int | None:
        """By the dry run if there was one, else by the formula."""
        if self.exact:
            return self.plan.peak_bytes
        return self.memory.total_bytes if self.memory else None


def this_machine() -> tuple[Gpu, str]:
    """(the device of this machine, or a T4 where PyTorch is missing; what to call it)."""
    from helpers.hardware import detect_gpu

    try:
        gpu = detect_gpu()
    except ImportError:
        return KNOWN_GPUS["T4"], "T4 (PyTorch is not installed here, so this machine is not known)"
    return gpu, f"this machine: {gpu}"


@lru_cache(maxsize=1)
def _hub() -> bool:
    from helpers.setup import hub_reachable

    return hub_reachable()


def reachable_hub(config: TrainConfig, gpu: Gpu) -> bool:
    """Can the Hub be reached? Asked once, and only if "auto" needs to know; a card elsewhere is taken to have a network."""
    needs_to_know = config.model == "auto" and gpu.kind == "cuda" and gpu not in KNOWN_GPUS.values()
    return _hub() if needs_to_know else True


@lru_cache(maxsize=64)
def _row(name: str) -> BaseModel:
    """The model as a row of the menu. A folder or Hub id is looked up once, not with every move of a slider."""
    for row in CATALOG.values():
        if name in (row.id, row.short_name):
            return row
    return BaseModel(name, find_shape(name))


def preview_of(
    config: TrainConfig, gpu: Gpu, examples: int | None = None, hub: bool = True, exact: bool = False
) -> Preview:
    """Plan `config` for `gpu`. Never raises for what a learner can set: the reason is in the answer.

    Args:
        examples: in the data file, before the split; decides how many steps an epoch has.
        hub: can the Hugging Face Hub be reached? Decides what "auto" means.
        exact: let the dry run decide (seconds) instead of the formula (instant).
    """
    wrong, config = problems(config), usable(config)
    name, why = choose_model(config, gpu, hub)
    try:
        row = _row(name)
    except (ConfigError, ImportError, OSError) as error:
        return Preview(name, why, None, gpu, None, None, str(error))
    if wrong:
        return Preview(name, why, row.shape, gpu, None, None, " ".join(dict.fromkeys(wrong.values())))
    steps = _steps(config, examples)
    known = {
        "model": name,
        "why_model": why,
        "shape": row.shape,
        "gpu": gpu,
        "steps": steps,
        "trainable": _trainable(config, row.shape),
    }
    try:
        plan = make_plan(config, gpu, row, exact=exact)
    except (ConfigError, DoesNotFit) as error:
        return Preview(**known, plan=None, memory=_smallest(config, gpu, row.shape), problem=str(error))
    except (
        ValueError,
        TypeError,
        ArithmeticError,
    ) as error:  # a value that no check names, such as a length of 20 digits
        return Preview(**known, plan=None, memory=None, problem=f"These settings cannot be planned: {error}.")
    step_seconds = plan.seconds_per_step or _seconds_per_step(config, plan, row.shape)
    return Preview(
        **known, plan=plan, memory=plan.memory, seconds=steps * step_seconds if steps and step_seconds else None
    )


def _steps(config: TrainConfig, examples: int | None) -> int | None:
    if config.max_steps > 0:
        return config.max_steps
    return total_steps(config, round(examples * (1 - config.validation_share))) if examples else None


def _seconds_per_step(config: TrainConfig, plan: Plan, shape: ModelShape | None) -> float | None:
    rate = speed(plan.gpu)
    if shape is None or not rate.source:
        return None
    return plan.accumulation * rate.seconds(
        *flops_and_bytes(shape, plan.micro_batch, plan.seq_len, plan.checkpointing, config.quantization)
    )


def _trainable(config: TrainConfig, shape: ModelShape | None) -> int | None:
    try:
        return shape.lora_parameters(config.r, config.target_modules) if shape else None
    except ValueError:  # layers that this model does not have
        return None


def _smallest(config: TrainConfig, gpu: Gpu, shape: ModelShape | None) -> MemoryEstimate | None:
    """The least that a step with these settings takes: one example at a time, checkpointing on."""
    on_gpu = gpu.kind == "cuda"
    try:
        return shape and estimate(
            shape,
            1,
            config.max_length,
            r=config.r,
            target_modules=config.target_modules,
            quantization=config.quantization,
            element_bytes=4 if compute_dtype(gpu, shape.model_type)[0] == "float32" else 2,
            attention=attention(gpu, shape)[0],
            loss_head=loss_head(gpu)[0],
            on_gpu=on_gpu,
            context=not gpu.has_context,
        )
    except (ValueError, TypeError, KeyError):
        return None


def light_of(config: TrainConfig, preview: Preview) -> str:
    """ "fits", "tight", "no", or "unknown" where the formula does not know the model."""
    if preview.plan is None:
        return "no"
    return light(config, preview.gpu, BaseModel(preview.model, preview.shape)) if preview.shape else "unknown"


def light(config: TrainConfig, gpu: Gpu, row: BaseModel) -> str:
    try:
        return fit_status(config, gpu, row)[0]
    except (ConfigError, ValueError, TypeError):  # a setting that cannot work anywhere
        return "no"

"""The one dataclass that a learner edits.

    config = TrainConfig(r=32, learning_rate=1e-4)
    config.max_length = 1024        # change a field whenever you like: nothing happens until you train
    config.check()                  # says what is wrong and how to mend it

Fields have the names that `LoraConfig` and `SFTConfig` use, so what you learn here you can use anywhere. What a field means and which
values work is declared once, in its metadata: `check()` and the panel's tooltips and menus come from there.
"""

from __future__ import annotations

import json
import operator
import re
from dataclasses import Field, asdict, dataclass, field, fields
from os import PathLike
from typing import Any

SCHEDULES = ("cosine", "linear", "constant_with_warmup", "constant", "polynomial", "inverse_sqrt")
# On every system: Windows takes off dots and spaces at the end, and no system takes more than 255 bytes ("-2" may follow).
FOLDER_NAME = re.compile(r'(?!\.)[^/\\:*?"<>|]{1,60}(?<![ .])')
BOUNDS = {"minimum": operator.ge, "maximum": operator.le, "above": operator.gt, "below": operator.lt}
# What the planner reads: with another of these, a plan would be another.
PLANNED = {"model", "quantization", "r", "lora_dropout", "target_modules", "max_length"}
PLANNED |= {"effective_batch_size", "micro_batch_size", "gradient_checkpointing"}
TYPES = {"int": "a whole number", "float": "a number", "str": "a text in quotes", "str | list[str]": "names of layers"}


class ConfigError(ValueError):
    """A setting that cannot work. The message names the setting, the reason and the fix."""


def setting(default: Any, explanation: str, **limits: Any) -> Any:
    """A field of `TrainConfig`, described by its metadata as transformers' `HfArgumentParser` does it.

    Args:
        limits: which values work: `choices`, or some of `minimum`, `maximum`, `above`, `below` (these two are excluded themselves).
    """
    return field(default=default, metadata={"help": explanation} | limits)


@dataclass
class TrainConfig:
    """Everything that decides what a training run does. Memory settings (micro-batch, checkpointing) are the planner's."""

    name: str = setting("run", "Name of the run folder: runs/<name>.")
    model: str = setting("auto", 'A name from the menu, a folder, a Hub id, or "auto": the best that fits here.')
    data: str = setting("data_samples/customer_support.jsonl", "The file with your examples.")
    validation_share: float = setting(0.15, "Part held out, never trained on; 0.1 to 0.2 is usual.", above=0, below=0.5)
    max_eval_samples: int = setting(48, "Most held-out examples for one evaluation during training.", minimum=1)
    num_evaluations: int = setting(8, "How often the validation loss is measured, besides before step 1.", minimum=1)
    early_stopping_patience: int = setting(3, "Stop after so many evaluations without a new best; 0: never.", minimum=0)

    quantization: str = setting("nf4", '"nf4": 4-bit base weights (QLoRA). "none": 16 bit.', choices=("nf4", "none"))
    r: int = setting(16, "Rank of the LoRA matrices: how much the adapter can learn. Nearly free in memory.", minimum=1)
    lora_alpha: int = setting(32, "The adapter's output is multiplied by lora_alpha / r.", minimum=1)
    lora_dropout: float = setting(
        0.0,
        "Share of the adapter's inputs zeroed; 0.05 helps on little data, costs memory and time.",
        minimum=0,
        below=1,
    )
    target_modules: str | list[str] = setting(  # noqa: RUF009
        "all-linear", 'Which layers get an adapter: "all-linear", or names such as ["q_proj", "v_proj"].'
    )

    max_length: int = setting(512, "Longest example in tokens (prompt and answer together).", minimum=1, maximum=2**20)
    effective_batch_size: int = setting(8, "Examples per step: micro-batch x accumulation.", minimum=1, maximum=10_000)
    micro_batch_size: int = setting(0, "Examples per forward pass, a divisor of those; 0: the planner's.", minimum=0)
    gradient_checkpointing: str = setting(
        "auto", "Compute activations twice to save memory; auto: only if needed.", choices=("auto", "on", "off")
    )
    num_train_epochs: float = setting(1.0, "How often each training example is seen.", above=0, maximum=1000)
    max_steps: int = setting(-1, "Stop after this many optimizer steps; -1 means: go by epochs.", minimum=-1)
    learning_rate: float = setting(2e-4, "Step size. 1e-4 to 5e-4 is usual for LoRA.", above=0, below=0.1)
    warmup_ratio: float = setting(0.1, "Part of the steps during which the rate rises from zero.", minimum=0, below=1)
    lr_scheduler_type: str = setting("cosine", "How the learning rate falls after the warmup.", choices=SCHEDULES)
    seed: int = setting(42, "Same seed, data and settings: same run.", minimum=0, maximum=2**32 - 1)  # NumPy's limit

    def __post_init__(self) -> None:
        self.check()

    def __setattr__(self, name: str, value: Any) -> None:
        """A path becomes the text that it is written as."""
        super().__setattr__(name, str(value) if isinstance(value, PathLike) else value)

    def problems(self) -> dict[str, str]:
        """Setting -> why it cannot work and what would; empty if all is well."""
        found = {item.name: _problem(item, getattr(self, item.name)) for item in fields(self)}
        if not found["name"] and not (FOLDER_NAME.fullmatch(self.name) and self.name.isprintable()):
            found["name"] = f"name={self.name!r} becomes a folder name: use 1 to 60 letters, digits, - and _."
        if self.max_steps == 0:
            found["max_steps"] = f"max_steps={self.max_steps!r} trains nothing: give a number, or -1 to go by epochs."
        batch, micro_batch = self.effective_batch_size, self.micro_batch_size
        if not (found["effective_batch_size"] or found["micro_batch_size"]) and micro_batch and batch % micro_batch:
            sizes = f"effective_batch_size={batch} is not divisible by micro_batch_size={micro_batch}"
            found["effective_batch_size"] = f"{sizes}: choose a divisor, or 0 to let the planner choose."
        return {name: problem for name, problem in found.items() if problem}

    def check(self) -> None:
        """Raise `ConfigError` with one line per setting that cannot work."""
        if problems := self.problems():
            raise ConfigError("\n".join(problems.values()))

    def planned(self) -> dict[str, Any]:
        """The settings that a plan is made of."""
        return {name: value for name, value in self.to_dict().items() if name in PLANNED}

    def to_dict(self) -> dict[str, Any]:
        """All settings as plain values, as they are written to the run folder."""
        return asdict(self)


def noted(examples: Any, **settings: Any) -> Any:
    """The Dataset with settings that it was made with in its description, which survives `select`, `map` and pickling."""
    examples.info.description = json.dumps(made_of(examples) | settings)
    return examples


def made_of(examples: Any) -> dict[str, Any]:
    """What `noted` wrote; {} of a Dataset that came from no file, or was made without this kit."""
    try:
        known = dict(json.loads(examples.info.description))
        return known if "data" in known else {}
    except (AttributeError, ValueError, TypeError):
        return {}


def _problem(item: Field[Any], value: Any) -> str:
    """Why a field cannot have this value; "" if it can."""
    if not _has_type(value, str(item.type)):
        return f"{item.name}={value!r} must be {TYPES[str(item.type)]}, such as {item.default!r}."
    choices = item.metadata.get("choices")
    if choices and value not in choices:
        return f"{item.name}={value!r} must be one of {', '.join(map(repr, choices))}."
    limits = {bound: limit for bound, limit in item.metadata.items() if bound in BOUNDS}
    if all(BOUNDS[bound](value, limit) for bound, limit in limits.items()):
        return ""
    allowed = ", ".join(f"{bound} {limit}" for bound, limit in limits.items())
    return f"{item.name}={value!r} is out of range ({allowed}); {item.default!r} is the default."


def _has_type(value: Any, annotation: str) -> bool:
    if annotation.startswith("str"):
        names = value if isinstance(value, (list, tuple)) and "list" in annotation else [value]
        return len(names) > 0 and all(isinstance(name, str) for name in names)
    number = int if annotation == "int" else (int, float)
    return isinstance(value, number) and not isinstance(value, bool) and abs(value) < float("inf")  # nor nan

"""Good starting points, as plain changes to the config: what a careful colleague would set before looking closer.

config = TrainConfig(**PRESETS["gentle"].changes)
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from helpers.config import TrainConfig


@dataclass(frozen=True)
class Preset:
    """Some fields of `TrainConfig` with their values, and when to take them. Fields that are not named stay as they are."""

    label: str
    lesson: str
    changes: dict[str, Any]


_NAMES = (
    "r",
    "lora_alpha",
    "lora_dropout",
    "learning_rate",
    "num_train_epochs",
    "max_steps",
    "early_stopping_patience",
    "num_evaluations",
    "warmup_ratio",
    "lr_scheduler_type",
)
_STANDARD = {item.name: item.default for item in fields(TrainConfig) if item.name in _NAMES}

PRESETS: dict[str, Preset] = {
    "gentle": Preset(
        "Gentle",
        "Few examples, or a model that should change little: small adapter, small steps, an early stop.",
        _STANDARD | {"r": 8, "lora_alpha": 16, "learning_rate": 1e-4, "early_stopping_patience": 2},
    ),
    "standard": Preset(
        "Standard",
        "The kit's own defaults: right for a few hundred to a few thousand examples.",
        _STANDARD,
    ),
    "thorough": Preset(
        "Thorough",
        "Every example three times, a bigger adapter, and more looks at the validation loss: three times as long.",
        _STANDARD
        | {
            "r": 32,
            "lora_alpha": 64,
            "lora_dropout": 0.05,
            "num_train_epochs": 3.0,
            "early_stopping_patience": 4,
            "num_evaluations": 16,
        },
    ),
    "8 GB card": Preset(
        "8 GB card",
        "4-bit weights, no dropout, 512 tokens, and the planner free to choose: models up to 3B fit 8 GB this way.",
        {
            "quantization": "nf4",
            "gradient_checkpointing": "auto",
            "micro_batch_size": 0,
            "effective_batch_size": 8,
            "max_length": 512,
            "r": 16,
            "lora_alpha": 32,
            "lora_dropout": 0.0,
            "target_modules": "all-linear",
        },
    ),
}

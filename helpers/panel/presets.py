"""Good starting points, as plain changes to the config: what a careful colleague would set before looking closer.

config = TrainConfig(**PRESETS["gentle"].changes)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Preset:
    """Some fields of `TrainConfig` with their values, and when to take them. Fields that are not named stay as they are."""

    label: str
    lesson: str
    changes: dict[str, Any]


_BY_EPOCHS = {"max_steps": -1}

PRESETS: dict[str, Preset] = {
    "gentle": Preset(
        "Gentle",
        "Few examples, or a model that should change little: small adapter, small steps, an early stop.",
        {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "learning_rate": 1e-4, "num_train_epochs": 1.0,
         "early_stopping_patience": 2, "evaluations": 8, "warmup_ratio": 0.1, "lr_scheduler_type": "cosine"} | _BY_EPOCHS,
    ),
    "standard": Preset(
        "Standard",
        "The kit's own defaults: right for a few hundred to a few thousand examples.",
        {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "learning_rate": 2e-4, "num_train_epochs": 1.0,
         "early_stopping_patience": 3, "evaluations": 8, "warmup_ratio": 0.1, "lr_scheduler_type": "cosine"} | _BY_EPOCHS,
    ),
    "thorough": Preset(
        "Thorough",
        "Every example three times, a bigger adapter, and more looks at the validation loss: three times as long.",
        {"r": 32, "lora_alpha": 64, "lora_dropout": 0.05, "learning_rate": 2e-4, "num_train_epochs": 3.0,
         "early_stopping_patience": 4, "evaluations": 16, "warmup_ratio": 0.1, "lr_scheduler_type": "cosine"} | _BY_EPOCHS,
    ),
    "8 GB card": Preset(
        "8 GB card",
        "4-bit weights, no dropout, 512 tokens, and the planner free to choose: models up to 3B fit 8 GB this way.",
        {"quantization": "nf4", "gradient_checkpointing": "auto", "micro_batch_size": 0, "effective_batch_size": 8, "max_length": 512,
         "r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"},
    ),
}  # fmt: skip

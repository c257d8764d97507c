"""Good starting points, as plain changes to the config: what a careful colleague would set before looking closer.

config = TrainConfig(**PRESETS["Gentle"].changes)
"""

from __future__ import annotations

from typing import Any, NamedTuple

from helpers.panel.settings import FIELDS


class Preset(NamedTuple):
    """Some fields of `TrainConfig` with their values, and when to take them. Fields that are not named stay as they are."""

    lesson: str
    changes: dict[str, Any]


def _defaults(names: str) -> dict[str, Any]:
    return {name: FIELDS[name].default for name in names.split()}


_STANDARD = _defaults(
    "r lora_alpha lora_dropout learning_rate num_train_epochs max_steps warmup_ratio lr_scheduler_type"
)
_STANDARD |= _defaults("early_stopping_patience num_evaluations")
_GENTLE = {"r": 8, "lora_alpha": 16, "learning_rate": 1e-4, "early_stopping_patience": 2}
_THOROUGH = {"r": 32, "lora_alpha": 64, "lora_dropout": 0.05, "num_train_epochs": 3.0}
_THOROUGH |= {"early_stopping_patience": 4, "num_evaluations": 16}
_SMALL = _defaults("quantization gradient_checkpointing micro_batch_size r lora_alpha lora_dropout target_modules")
_SMALL |= {"effective_batch_size": 8, "max_length": 512}

PRESETS = {
    "Gentle": Preset(
        "Few examples, or a model that should change little: small adapter, small steps, an early stop.",
        _STANDARD | _GENTLE,
    ),
    "Standard": Preset("The kit's own defaults: right for a few hundred to a few thousand examples.", _STANDARD),
    "Thorough": Preset(
        "Every example three times, a bigger adapter, and more looks at the validation loss: three times as long.",
        _STANDARD | _THOROUGH,
    ),
    "8 GB card": Preset(
        "4-bit weights, no dropout, 512 tokens, and the planner free to choose: models up to 3B fit 8 GB this way.",
        _SMALL,
    ),
}

"""The settings: which values are refused, and in which words."""

from dataclasses import fields
from pathlib import Path

import pytest

from helpers.config import BOUNDS, TYPES, ConfigError, TrainConfig

REFUSED = {
    "name": ["a/b", "", "..", None, 5, "x" * 61, "two\nlines", "a."],
    "model": [None],
    "data": [None, 3],
    "validation_share": [0.5, 0, 0.9, float("nan"), "15 %"],
    "early_stopping_patience": [-1],
    "quantization": ["int3", None, ["nf4"]],
    "r": [0, -3, "16", 16.0, None, True, [8]],
    "lora_dropout": [1.0, -0.1, float("inf")],
    "target_modules": [None, [], [1], 5],
    "max_length": [0, None, float("inf"), 10**30],
    "effective_batch_size": [0, 2.5, 10**7, 10**30],
    "micro_batch_size": [-1, "auto"],
    "gradient_checkpointing": ["maybe", True],
    "num_train_epochs": [0, 10**30],
    "max_steps": [0, -2, False],
    "learning_rate": [0, 0.1, -1e-4, "2e-4", True, None, float("nan"), float("inf"), [2e-4, 1e-4]],
    "warmup_ratio": [1.0, 5],
    "lr_scheduler_type": [None, "cosin"],
    "seed": [1.5, -1, 10**30],
}
REFUSED_PAIRS = [(field, value) for field, values in REFUSED.items() for value in values]


def test_defaults_are_valid_and_plain_values():
    settings = TrainConfig().to_dict()
    assert settings["r"] == 16 and settings["quantization"] == "nf4"
    assert all(isinstance(value, (str, int, float)) for value in settings.values())


@pytest.mark.parametrize(("field", "value"), REFUSED_PAIRS, ids=str)
def test_an_impossible_value_is_refused_by_name(field, value):
    with pytest.raises(ConfigError) as error:
        TrainConfig(**{field: value})
    assert str(error.value).startswith(f"{field}={value!r} ")


@pytest.mark.parametrize(
    ("field", "value"),
    [("target_modules", ("q_proj",)), ("num_train_epochs", 3), ("lora_dropout", 0), ("max_steps", -1), ("seed", 2**31)],
)
def test_a_value_that_works_is_taken(field, value):
    assert getattr(TrainConfig(**{field: value}), field) == value


def test_a_path_becomes_text_whenever_it_is_set():
    config = TrainConfig(data=Path("letters.csv"))
    config.model = Path("models") / "mine"
    config.check()
    assert config.to_dict()["data"] == "letters.csv" and config.model == str(Path("models", "mine"))


def test_a_field_edited_later_is_checked_too_and_all_faults_are_listed():
    config = TrainConfig(micro_batch_size=4)
    config.r, config.learning_rate, config.effective_batch_size = 0, 0, 6
    with pytest.raises(ConfigError) as error:
        config.check()
    assert len(str(error.value).splitlines()) == 3 and "not divisible by micro_batch_size=4" in str(error.value)


@pytest.mark.parametrize("item", fields(TrainConfig), ids=lambda item: item.name)
def test_every_setting_is_declared_once_with_all_that_is_said_of_it(item):
    assert item.type in TYPES and len(item.metadata["help"]) > 10
    assert set(item.metadata) <= {"help", "choices", *BOUNDS}
    assert item.default in item.metadata.get("choices", [item.default])
    assert item.type.startswith("str") == isinstance(item.default, str)

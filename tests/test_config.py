import pytest

from helpers.config import ConfigError, TrainConfig


def test_defaults_are_valid_and_plain_values():
    settings = TrainConfig().to_dict()
    assert settings["r"] == 16 and settings["quantization"] == "nf4"
    assert all(isinstance(value, (str, int, float)) for value in settings.values())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", 0),
        ("lora_dropout", 1.0),
        ("learning_rate", 0),
        ("learning_rate", -1e-4),
        ("validation_share", 0.5),
        ("validation_share", 0),
        ("max_steps", 0),
        ("max_steps", -2),
        ("num_train_epochs", 0),
        ("effective_batch_size", 0),
        ("quantization", "int3"),
        ("name", "a/b"),
        ("name", ""),
        ("name", ".."),
    ],
)
def test_an_impossible_value_is_refused_by_name(field, value):
    with pytest.raises(ConfigError, match=field):
        TrainConfig(**{field: value})


def test_a_field_edited_later_is_checked_too_and_all_faults_are_listed():
    config = TrainConfig()
    config.r, config.learning_rate = 0, 0
    with pytest.raises(ConfigError) as error:
        config.check()
    assert len(str(error.value).splitlines()) == 2

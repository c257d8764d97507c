"""Mistakes that would train with a normal-looking curve, or fail after an hour, found before the first step.

check_before_training(trainer, config)      # raises with the fix; prints what is only odd
"""

from __future__ import annotations

import torch
from trl import SFTTrainer

from helpers.config import ConfigError, TrainConfig
from helpers.data import DataError
from helpers.data.tokens import TokenCheck, Tokens

USUAL_LEARNING_RATES = (1e-5, 2e-3)  # LoRA: outside of this, nothing happens or everything breaks (usual: 1e-4 to 5e-4)
ABSURD_LEARNING_RATE = 0.1
EXAMPLES_LOOKED_AT = 200


def check_before_training(trainer: SFTTrainer, config: TrainConfig, given: int | None = None) -> None:
    """Look at what would really be trained: the tokens and labels of the trainer, its parameters, its settings.

    Args:
        given: how many training examples there were before TRL dropped those without a trained token.

    Raises:
        DataError: nothing in the examples would be trained, or the answers would never learn to end.
        ConfigError: a setting cannot lead to anything.
    """
    _check_parameters(trainer)
    _check_labels(trainer)
    _check_settings(config, len(trainer.train_dataset))
    lost, limit = (given or 0) - len(trainer.train_dataset), trainer.args.max_length
    if lost > 0:
        print(f"[WARN] {lost} of {given} examples are left out: max_length ({limit}) cuts their whole answer.")


def _check_parameters(trainer: SFTTrainer) -> None:
    dtypes = {parameter.dtype for parameter in trainer.model.parameters() if parameter.requires_grad}
    if not dtypes:
        raise ConfigError("No parameter is trainable. Check target_modules: it must name layers of the model.")
    if dtypes != {torch.float32}:
        found = ", ".join(sorted(map(str, dtypes)))
        raise ConfigError(f"Adapters must be torch.float32, found {found}: small updates would be lost.")


def _check_labels(trainer: SFTTrainer) -> None:
    """The tokens that TRL will train, by the same check that the data report uses."""
    check, limit = TokenCheck(trainer.processing_class), f"max_length is {trainer.args.max_length}"
    rows = trainer.train_dataset.select(range(min(EXAMPLES_LOOKED_AT, len(trainer.train_dataset))))
    for number, row in enumerate(rows, start=1):
        check.add(row, Tokens(row["input_ids"], row["labels"]), f"Training example {number}")
    if not len(rows):
        raise DataError(
            f"Every label is masked, so nothing would be learned: answers are empty, or cut away ({limit})."
        )
    if reason := check.stop():
        raise DataError(f"{reason} ({limit})")
    if cut := check.looked_at - check.ended:
        looked_at = f"{cut} of the first {check.looked_at} examples"
        print(f"[WARN] {looked_at} do not end with the end token: they are cut ({limit}).")


def _check_settings(config: TrainConfig, examples: int) -> None:
    (low, high), rate = USUAL_LEARNING_RATES, config.learning_rate
    if rate >= ABSURD_LEARNING_RATE:
        raise ConfigError(f"learning_rate={rate} would destroy the model in a few steps; LoRA uses 1e-4 to 5e-4.")
    if not low <= rate <= high:
        consequence = "slow" if rate < low else "may diverge"
        print(f"[WARN] learning_rate={rate} is unusual for LoRA ({low} to {high}): {consequence}.")
    if config.effective_batch_size > examples:
        raise ConfigError(
            f"effective_batch_size={config.effective_batch_size} is larger than the {examples} training examples: one step "
            f"would be more than an epoch. Use {max(1, examples // 4)} or less, or add examples."
        )

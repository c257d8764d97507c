"""Mistakes that would train with a normal-looking curve, or fail after an hour, found before the first step.

check_job(config, plan, model, training, validation)    # do they belong together? Asked before anything is written
check_before_training(trainer, config)                  # is it worth training? Prints what is only odd
check_run(run, examples)                                # does an evaluation with these say something about this run?
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import SFTTrainer

from helpers.config import ConfigError, TrainConfig, made_of
from helpers.data import DataError
from helpers.data.tokens import TokenCheck, Tokens
from helpers.plan import Plan
from helpers.runs import Run

USUAL_LEARNING_RATES = (1e-5, 2e-3)  # LoRA: outside of this, nothing happens or everything breaks (usual: 1e-4 to 5e-4)
EXAMPLES_LOOKED_AT = 200
SPLIT = "split(load_examples(config.data), config.validation_share, config.seed)"


def check_job(config: TrainConfig, plan: Plan, model: Any, training: Dataset, validation: Dataset) -> None:
    """Refuse what was made with other settings than `config` has by now; what was made without this kit is taken as it is.

    Raises ConfigError if a setting cannot work or has changed, so that a cell has to be run again; DataError if a part is empty.
    """
    config.check()
    _same("The plan", plan.made_of, config.planned(), "make_plan")
    loaded_as = {"model": plan.model, "quantization": config.quantization, "dtype": plan.dtype}
    _same("The model", getattr(model, "made_of", {}), loaded_as, "load_quantized")
    for part in (training, validation):
        if not len(part):
            raise DataError(f"There are no examples to train on, or none to validate with: run the cell with {SPLIT}.")
        _same("The data", made_of(part), _with_full_path(config.to_dict()), SPLIT)


def check_run(run: Run, examples: Dataset) -> None:
    """Refuse to judge a run by another adapter than its own (ValueError), or by examples that it may have been trained on (ConfigError)."""
    own, settings, known = run.adapter.resolve(), _with_full_path(run.settings), made_of(examples)
    if run.model is None or getattr(run.model, "made_of", {}).get("adapter", own) != own:
        raise ValueError("Model not in memory: run the train cell, or run.model = load_adapter(run.adapter, model).")
    if known.get("data") == settings["data"]:
        _same("This part of the data", {"validation_share": None, "seed": None} | known, settings, SPLIT)


def _same(what: str, was: dict[str, Any], now: dict[str, Any], cell: str) -> None:
    changed = [name for name in was if was[name] != now.get(name, was[name])]
    if changed:
        then, today = (", ".join(f"{name}={values[name]!r}" for name in changed) for values in (was, now))
        now_says = f"{what} was made with {then}, and the settings now say {today}"
        raise ConfigError(f"{now_says}: run the cell with {cell} again, or set them back.")


def _with_full_path(settings: dict[str, Any]) -> dict[str, Any]:
    return settings | {"data": str(Path(settings.get("data", "")).resolve())}


def check_before_training(trainer: SFTTrainer, config: TrainConfig, given: int | None = None) -> None:
    """Look at what would really be trained: the tokens and labels of the trainer, and settings that depend on how many there are.

    Raises DataError if no token would be trained, or answers would never learn to end; ConfigError if a setting cannot lead to anything.

    Args:
        given: how many training examples there were before TRL dropped those without a trained token.
    """
    examples, (low, high), rate = len(trainer.train_dataset), USUAL_LEARNING_RATES, config.learning_rate
    _check_labels(trainer, f"max_length is {trainer.args.max_length}")
    if not low <= rate <= high:
        consequence = "slow" if rate < low else "may diverge"
        print(f"[WARN] learning_rate={rate} is unusual for LoRA ({low} to {high}): {consequence}.")
    if config.effective_batch_size > examples:
        raise ConfigError(
            f"effective_batch_size={config.effective_batch_size} is larger than the {examples} training examples: one step "
            f"would be more than an epoch. Use {max(1, examples // 4)} or less, or add examples."
        )
    if given and given > examples:
        left_out = f"{given - examples} of {given} examples are left out"
        print(f"[WARN] {left_out}: max_length ({trainer.args.max_length}) cuts their whole answer.")


def _check_labels(trainer: SFTTrainer, limit: str) -> None:
    """The tokens that TRL will train, by the same check that the data report uses."""
    check = TokenCheck(trainer.processing_class)
    rows = trainer.train_dataset.select(range(min(EXAMPLES_LOOKED_AT, len(trainer.train_dataset))))
    for number, row in enumerate(rows, start=1):
        check.add(row, Tokens(row["input_ids"], row["labels"]), f"Training example {number}")
    if not len(rows):
        raise DataError(f"Every label is masked, nothing would be learned: answers are empty, or cut away ({limit}).")
    if reason := check.stop():
        raise DataError(f"{reason} ({limit})")
    if cut := check.looked_at - check.ended:
        looked_at = f"{cut} of the first {check.looked_at} examples"
        print(f"[WARN] {looked_at} do not end with the end token: they are cut ({limit}).")

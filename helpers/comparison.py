"""Several runs side by side: train a list of variations, then see their curves, times and memory together.

runs = sweep(config, [{"r": 4}, {"r": 16}, {"r": 64}], plan, model, tokenizer, training, validation)
table, figure = compare_runs(runs)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from matplotlib.figure import Figure

from helpers.charts import comparison_chart
from helpers.config import ConfigError, TrainConfig
from helpers.memory import GIB
from helpers.runs import Run

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from helpers.planner import Plan

NEEDS_ANOTHER_MODEL = ("model", "quantization")
NEEDS_ANOTHER_SPLIT = ("data", "validation_share", "seed")
NOT_A_DIFFERENCE = ("name", "data_sha256")


def sweep(
    config: TrainConfig,
    overrides: Sequence[dict[str, Any]],
    plan: Plan,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    training: Dataset,
    validation: Dataset,
    root: str | Path = "runs",
) -> list[Run]:
    """Train `config` once for each dict of `overrides`, with the same seed, budget and split; finished ones are only looked up.

    Args:
        overrides: fields of `TrainConfig` with the values to try, such as `{"r": 4}`.

    Raises:
        ConfigError: an override needs other weights or another split, so it could not be compared fairly in one call.
    """
    from helpers.planner import make_plan
    from helpers.training import train

    runs = []
    for override in overrides:
        for field in (*NEEDS_ANOTHER_MODEL, *NEEDS_ANOTHER_SPLIT):
            if field in override:
                raise ConfigError(
                    f"A sweep keeps model and split fixed, so it cannot vary {field!r}. Train that as a run of its own."
                )
        words = [f"{field}-{value}" for field, value in override.items()]
        name = "-".join([config.name, *words]).translate(str.maketrans(dict.fromkeys("/\\:*?\"<>|[]', ")))
        variation = replace(config, **{"name": name} | override)
        print(f"— {', '.join(f'{field} = {value}' for field, value in override.items()) or 'unchanged'}")
        own_plan = make_plan(variation, plan.gpu, plan.model, exact=plan.measured is not None)
        run = train(variation, own_plan, model, tokenizer, training, validation, root=root)
        model, run.model = run.model, None  # one adapter in memory at a time
        runs.append(run)
    return runs


def compare_runs(runs: Iterable[Run | str | Path]) -> tuple[pd.DataFrame, Figure]:
    """(table, chart) of recorded runs: the settings that differ, the best validation loss and its step, time, peak memory.

    Args:
        runs: `Run` objects or run folders, in the order to show.

    Raises:
        FileNotFoundError: a folder holds no run.
    """
    runs = [run if isinstance(run, Run) else Run.load(run) for run in runs]
    fields = dict.fromkeys(field for run in runs for field in run.settings if field not in NOT_A_DIFFERENCE)
    differing = [field for field in fields if len({repr(run.settings.get(field)) for run in runs}) > 1]
    rows = []
    for run in runs:
        trained = any(step > 0 for step, _ in run.evaluations)
        rows.append(
            {"run": run.folder.name}
            | {field: run.settings.get(field) for field in differing}
            | {
                "checkpointing": run.plan.get("checkpointing"),
                "best validation loss": run.best_eval_loss if trained else None,
                "at step": run.best_step if trained else None,
                "minutes": run.seconds / 60,
                "peak GiB": run.peak_bytes / GIB,
                "finished": run.finished,
            }
        )
    labels = [
        ", ".join(f"{field} = {run.settings.get(field)}" for field in differing) or run.folder.name for run in runs
    ]
    unique = [label if labels.count(label) == 1 else f"{label} ({run.folder.name})" for label, run in zip(labels, runs)]
    figure = comparison_chart({label: run.history for label, run in zip(unique, runs)})
    return pd.DataFrame(rows).round({"best validation loss": 3, "minutes": 2, "peak GiB": 2}), figure

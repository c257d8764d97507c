"""Several runs side by side: train a list of variations, then see their curves, times and memory together.

runs = sweep(config, [{"r": 4}, {"r": 16}, {"r": 64}], plan, model, tokenizer, training, validation)
table, figure = compare_runs(runs)

The panel's last section: recorded runs side by side, their curves on one chart, and the settings that differ.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ipywidgets as widgets
import pandas as pd
from matplotlib.figure import Figure

from helpers.config import ConfigError, TrainConfig
from helpers.memory import GIB
from helpers.panel.controls import explain, picture
from helpers.plots import comparison_chart
from helpers.runs import Run

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from helpers.plan import Plan


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
    from helpers.train import train

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


MOST_ROWS = 8


class CompareView(widgets.VBox):
    """A list of run folders; whatever is chosen is drawn below it."""

    def __init__(self, root: str | Path = "runs") -> None:
        self.root = Path(root)
        self.runs = widgets.SelectMultiple(
            description="runs",
            rows=4,
            layout={"width": "auto", "flex": "1 1 260px", "max_width": "520px", "min_width": "0"},
        )
        self.again = widgets.Button(description="Look for new runs", layout={"width": "auto"})
        explain(
            self.runs,
            "Choose two or more with Ctrl or Shift: training several and comparing them is how settings are found.",
        )
        explain(self.again, "Reads the folder of runs again, after a training.")
        self.note = widgets.HTML(layout={"width": "auto"})
        self.table = widgets.HTML(layout={"width": "auto"})
        self.picture, self.frame = picture("720px")
        self.runs.add_class("ftk-control")
        self.runs.observe(self._draw, "value")
        self.again.on_click(lambda button: self.find())
        super().__init__(
            [widgets.Box([self.runs, self.again], layout={"flex_flow": "row wrap"}), self.note, self.table, self.frame]
        )
        self.find()

    def find(self) -> None:
        """List the run folders, keeping what is chosen."""
        names = sorted(file.parent.name for file in self.root.glob("*/run.json"))
        chosen = tuple(name for name in self.runs.value if name in names)
        if tuple(self.runs.options) != tuple(names):
            self.runs.options = names
            self.runs.rows = max(2, min(MOST_ROWS, len(names)))
        self.runs.value = chosen
        self._draw()

    def _draw(self, change: object = None) -> None:
        names = self.runs.value
        self.table.value, note, shown = "", "", False
        if names:
            shown, note = self._compare([self.root / name for name in names])
        elif self.runs.options:
            note = "Choose two or more with Ctrl or Shift."
        else:
            note = f"No recorded runs in {self.root}/ yet: train first."
        self.frame.layout.display = None if shown else "none"
        self.note.value = f'<div class="ftk-small">{escape(note)}</div>'

    def _compare(self, folders: list[Path]) -> tuple[bool, str]:
        """Draw the runs that can be read. Returns (is anything drawn?, what could not be read and why)."""
        problems = {}
        try:
            found = _compared(folders)
        except Exception:  # a folder that is half written, gone, or from another version: which one?
            problems = {folder: problem for folder in folders if (problem := _problem(folder))}
            folders = [folder for folder in folders if folder not in problems]
            if not folders or not problems:
                return False, _left_out(problems) or "These runs cannot be compared with each other."
            found = _compared(folders)
        self.table.value, self.picture.value = found
        return True, _left_out(problems)


def _compared(folders: list[Path]) -> tuple[str, bytes]:
    """(table as HTML, chart as PNG)."""
    from helpers.panel.compare import compare_runs

    table, figure = compare_runs(folders)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return (
        f'<div class="ftk-scroll" tabindex="0">{table.to_html(index=False, border=0, na_rep="")}</div>',
        buffer.getvalue(),
    )


def _problem(folder: Path) -> str:
    """Why a run cannot be shown even alone; "" if it can."""
    try:
        _compared([folder])
    except Exception as error:  # whatever a broken folder may bring up
        return f"{type(error).__name__}: {error}"
    return ""


def _left_out(problems: dict[Path, str]) -> str:
    reasons = "; ".join(f"{folder} ({why})" for folder, why in problems.items())
    return (
        f"Left out, because it cannot be read: {reasons}. Delete the folder, or train that run again."
        if reasons
        else ""
    )

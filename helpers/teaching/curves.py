"""Four short runs for lesson 05, each with another fault planted (one with none), shown without their names until they are named.

runs = planted_runs(small, plan, model, tokenizer, training, validation)     # letter -> PlantedRun, drawn while they train
reveal(runs)                                                                 # what was done to each, and the verdict
"""

from __future__ import annotations

import math
import random
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from transformers import TrainerCallback

from helpers.callbacks import TrainingStopped
from helpers.charts import BEST, MUTED, TRAIN, VALIDATION
from helpers.config import TrainConfig
from helpers.live import has_notebook
from helpers.pictures import Place
from helpers.runs import History
from helpers.training import build_trainer
from helpers.verdict import verdict

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from helpers.planner import Plan

FEW = 4  # examples of the run that sees too few of them
# What is done to each run: (learning rate, training examples; None: all). Usual for LoRA are 1e-4 to 5e-4; these runs have a dozen
# steps and take larger ones.
PLANTED: dict[str, tuple[float, int | None]] = {
    "healthy": (1e-3, None),
    "underfit": (1e-6, None),
    "overfit": (2e-3, FEW),
    "diverged": (3e-2, None),
}
TOP = 1.35  # the charts end at so many times the untrained model's loss; what lies above gets an arrow


@dataclass
class PlantedRun:
    """One of the four. What was done to it is not printed, so that showing the object gives nothing away."""

    planted: str = field(repr=False)
    learning_rate: float = field(repr=False)
    examples: int = field(repr=False)
    history: History = field(default_factory=list, repr=False)


def planted_runs(
    config: TrainConfig,
    plan: Plan,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    training: Dataset,
    validation: Dataset,
    seed: int = 0,
) -> dict[str, PlantedRun]:
    """Train the four runs from the same start, in an order that only the seed knows, and draw them as they go.

    Args:
        config: steps, batch and evaluations of each; its learning rate is replaced.
    """
    kinds = list(PLANTED)
    random.Random(seed).shuffle(kinds)
    runs: dict[str, PlantedRun] = {}
    place = Place()

    def redraw() -> None:
        if has_notebook():
            place.show(
                four_curves(runs, config.max_steps),
                f"Training and validation loss of the runs {', '.join(runs)}, without their names",
            )

    for letter, kind in zip("ABCD", kinds):
        rate, examples = PLANTED[kind]
        chosen = training if examples is None else training.select(range(min(examples, len(training))))
        runs[letter] = PlantedRun(kind, rate, len(chosen))
        settings = replace(config, learning_rate=rate, early_stopping_patience=0)
        with tempfile.TemporaryDirectory() as folder:
            trainer = build_trainer(settings, plan, model, tokenizer, chosen, validation, folder)
            trainer.args.save_strategy, trainer.args.load_best_model_at_end = "no", False  # only the curve is wanted
            trainer.args.logging_steps = 1
            trainer.add_callback(_Writer(runs[letter].history, redraw))
            with suppress(TrainingStopped):  # the loss is no number any more (in fp16, it may be): that is the curve
                trainer.train()
    return runs


def reveal(runs: Mapping[str, PlantedRun], diagnosis: Mapping[str, str | None] | None = None) -> pd.DataFrame:
    """One row per run: what the learner said, what was done to it, and the verdict on its curve.

    Args:
        diagnosis: letter -> the learner's word, None where there is none yet.
    """
    said = diagnosis or {}
    rows = [
        {
            "run": letter,
            "you said": said.get(letter) or "?",
            "it is": run.planted,
            "learning rate": f"{run.learning_rate:g}",
            "training examples": run.examples,
            "the verdict on its curve": str(verdict(run.history)),
        }
        for letter, run in runs.items()
    ]
    return pd.DataFrame(rows).set_index("run")


def four_curves(runs: Mapping[str, PlantedRun], steps: int) -> Figure:
    """Training and validation loss of up to four runs on the same axes limits, with letters instead of names."""
    figure = Figure(figsize=(7.6, 5.6), dpi=110, layout="constrained")
    panels = figure.subplots(2, 2, sharex=True, sharey=True)
    first = [event["eval_loss"] for run in runs.values() for event in run.history[:1] if event.get("eval_loss")]
    top = TOP * max(first, default=1.0)
    for axes, letter in zip(panels.flat, "ABCD"):
        axes.set_title(f"run {letter}", loc="left", fontsize=10.5)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
        axes.set_xlim(-0.4, steps + 0.4)
        axes.set_ylim(0, top)
        if letter in runs:
            _draw(axes, runs[letter].history, top)
    for axes in panels[1]:
        axes.set_xlabel("optimizer step")
    for axes in panels[:, 0]:
        axes.set_ylabel("loss per token")
    if runs:
        panels[0, 0].legend(frameon=False, loc="lower left", fontsize=8.5)
    return figure


def bootstrap_chart(means: Mapping[str, Any], intervals: Mapping[str, tuple[float, float]]) -> Figure:
    """Histograms of redrawn means (label -> values), with the interval that holds 95 % of each as a bar above it."""
    figure = Figure(figsize=(7.2, 2.9), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    highest = 0.0
    for (label, values), colour in zip(means.items(), (MUTED, BEST)):
        counts, _, _ = axes.hist(
            values, bins=25, range=(0, 1), color=colour, alpha=0.75, edgecolor="white", label=label
        )
        highest = max(highest, counts.max())
    for (low, high), colour in zip(intervals.values(), (MUTED, BEST)):
        axes.plot([low, high], [highest * 1.08] * 2, color=colour, linewidth=5, solid_capstyle="butt")
        axes.annotate(
            f"{low:.0%} to {high:.0%}", ((low + high) / 2, highest * 1.12), ha="center", va="bottom", fontsize=8.5
        )
    axes.set_ylim(0, highest * 1.3)
    axes.set_xlim(-0.04, 1.04)
    axes.set_xlabel("mean score of the redrawn letters")
    axes.set_ylabel("drawings")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="center right")
    return figure


def _draw(axes: Axes, history: History, top: float) -> None:
    for key, colour, label, marker in (
        ("loss", TRAIN, "training loss", "."),
        ("eval_loss", VALIDATION, "validation loss", "o"),
    ):
        points = [(event["step"], event[key]) for event in history if event.get(key) is not None]
        if points:
            axes.plot(*zip(*points), color=colour, linewidth=1.7, marker=marker, markersize=5, label=label)
    losses = [event["loss"] for event in history if event.get("loss") is not None]
    if any("loss" in event and event["loss"] is None for event in history):
        _above(axes, "not a number")
    elif losses and max(losses) > top:
        _above(axes, f"up to {max(losses):.0f}")


def _above(axes: Axes, words: str) -> None:
    axes.annotate(
        words,
        (0.98, 1.0),
        xytext=(0.98, 0.84),
        xycoords="axes fraction",
        ha="right",
        fontsize=9,
        color=TRAIN,
        arrowprops={"arrowstyle": "->", "color": TRAIN},
    )


class _Writer(TrainerCallback):
    """Notes each loss (None where it is no number), and has the picture drawn at each validation point."""

    def __init__(self, history: History, redraw: Callable[[], None]) -> None:
        self.history, self.redraw = history, redraw

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        event = {
            key: value if math.isfinite(value) else None
            for key, value in (logs or {}).items()
            if key in ("loss", "eval_loss")
        }
        if event:
            self.history.append({"step": state.global_step, **event})
        if "eval_loss" in event:
            self.redraw()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.redraw()

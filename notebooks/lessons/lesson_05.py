"""Lesson 05: four runs with a fault in three of them, what is learned first, and the checks of the exercises.

runs = faulty_runs(small, plan, model, tokenizer, training, validation)     # letter -> FaultyRun, drawn while they train
reveal(runs)                                                                # what was done to each, and the diagnosis
form, facts = loss_by_part(model, tokenizer, examples, OPENINGS)            # loss of fixed phrases, and of everything else
"""

from __future__ import annotations

import math
import random
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from matplotlib.figure import Figure
from torch.nn.functional import cross_entropy
from transformers import TrainerCallback

from helpers.callbacks import TrainingStopped
from helpers.config import TrainConfig
from helpers.diagnosis import diagnose
from helpers.evaluation import Model, Tokenizer
from helpers.metrics import bootstrap_interval
from helpers.plan import Plan
from helpers.plots import BEST, MUTED, TRAIN, VALIDATION, Place, has_notebook
from helpers.runs import History
from helpers.train import build_trainer
from notebooks.lessons.scaffold import NotYet, attempt, chart, exercise, must_be, number, pair

# What is done to each run: (learning rate, training examples; None: all). Usual for LoRA are 1e-4 to 5e-4; these runs have a dozen
# steps and take larger ones.
FAULTS: dict[str, tuple[float, int | None]] = {
    "healthy": (1e-3, None),
    "underfit": (1e-6, None),
    "overfit": (2e-3, 4),
    "diverged": (3e-2, None),
}
TOP = 1.35  # the charts end at so many times the untrained model's loss; what lies above gets an arrow


@dataclass(repr=False)
class FaultyRun:
    """One of the four. It is not printed, so that showing the object gives nothing away."""

    fault: str
    learning_rate: float
    examples: int
    history: History = field(default_factory=list)


class _AtEvaluation(TrainerCallback):
    """Calls a function with all log events at each validation point."""

    def __init__(self, show: Callable[[History], None]) -> None:
        self.show = show

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.show(state.log_history)


def faulty_runs(
    config: TrainConfig, plan: Plan, model: Model, tokenizer: Tokenizer, training: Dataset, validation: Dataset
) -> dict[str, FaultyRun]:
    """Train the four runs from the same start, in a hidden order and each with its own learning rate; draw them as they go."""
    kinds = list(FAULTS)
    random.Random(0).shuffle(kinds)
    runs: dict[str, FaultyRun] = {}
    place = Place()

    def show(events: History) -> None:
        runs[letter].history = _losses(events)
        if has_notebook():
            words = f"Training and validation loss of the runs {', '.join(runs)}, without their names"
            place.show(four_curves(runs, config.max_steps), words)

    for letter, kind in zip("ABCD", kinds):
        rate, examples = FAULTS[kind]
        chosen = training.select(range(min(examples or len(training), len(training))))
        runs[letter] = FaultyRun(kind, rate, len(chosen))
        settings = replace(config, learning_rate=rate, early_stopping_patience=0)
        with tempfile.TemporaryDirectory() as folder:
            trainer = build_trainer(settings, plan, model, tokenizer, chosen, validation, folder)
            trainer.args.save_strategy, trainer.args.load_best_model_at_end = "no", False  # only the curve is wanted
            trainer.args.logging_steps = 1
            trainer.add_callback(_AtEvaluation(show))
            with suppress(TrainingStopped):  # the loss is no number any more (in fp16, it may be): that is the curve
                trainer.train()
        show(trainer.state.log_history)
    return runs


def _losses(events: History) -> History:
    """The losses of a trainer's log; None where one is no number."""
    kept = [(event["step"], key, event[key]) for event in events for key in ("loss", "eval_loss") if key in event]
    return [{"step": step, key: loss if math.isfinite(loss) else None} for step, key, loss in kept]


def reveal(runs: Mapping[str, FaultyRun], diagnosis: Mapping[str, str | None] | None = None) -> pd.DataFrame:
    """One row per run: what the learner said (if anything yet), what was done to it, and the verdict on its curve."""
    said = diagnosis or {}
    rows = {
        letter: (said.get(letter) or "?", run.fault, f"{run.learning_rate:g}", run.examples, str(diagnose(run.history)))
        for letter, run in runs.items()
    }
    columns = ["you said", "it is", "learning rate", "training examples", "the verdict on its curve"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns).rename_axis("run")


@chart
def four_curves(runs: Mapping[str, FaultyRun], steps: int) -> Figure:
    """Training and validation loss of up to four runs on the same axes limits, with letters instead of names."""
    top = TOP * max((run.history[0].get("eval_loss") or 1.0 for run in runs.values() if run.history), default=1.0)
    figure = Figure(figsize=(7.6, 5.6))
    limits = {"xlim": (-0.4, steps + 0.4), "ylim": (0, top)}
    panels = figure.subplots(2, 2, sharex=True, sharey=True, subplot_kw=limits)
    figure.supxlabel("optimizer step", fontsize="medium")
    figure.supylabel("loss per token", fontsize="medium")
    for axes, letter in zip(panels.flat, "ABCD"):
        axes.set_title(f"run {letter}")
        history = runs[letter].history if letter in runs else []
        for key, color, marker in (("loss", TRAIN, "."), ("eval_loss", VALIDATION, "o")):
            events = [event for event in history if event.get(key) is not None]
            steps_done, losses = [event["step"] for event in events], [event[key] for event in events]
            axes.plot(steps_done, losses, color=color, marker=marker, markersize=5)
        losses = [event["loss"] for event in history if "loss" in event]
        words = "not a number" if None in losses else f"up to {max(losses):.0f}" if max(losses, default=0) > top else ""
        axes.text(0.98, 0.9, f"{words} ↑" if words else "", ha="right", color=TRAIN, transform=axes.transAxes)
    panels[0, 0].legend(["training loss", "validation loss"], loc="lower left")
    return figure


@chart
def bootstrap_chart(means: Mapping[str, Any], intervals: Mapping[str, tuple[float, float]]) -> Figure:
    """Histograms of redrawn means (label -> values), with the interval that holds 95 % of each as a bar above it."""
    figure = Figure(figsize=(7.2, 2.9))
    axes = figure.add_subplot(xlabel="mean score of the redrawn letters", ylabel="resamples", xlim=(-0.04, 1.04))
    for (label, values), (low, high), color in zip(means.items(), intervals.values(), (MUTED, BEST)):
        axes.hist(values, bins=25, range=(0, 1), color=color, alpha=0.75, edgecolor="white", label=label)
        above = {"transform": axes.get_xaxis_transform()}
        axes.plot([low, high], [0.86, 0.86], color=color, linewidth=5, solid_capstyle="butt", **above)
        axes.text((low + high) / 2, 0.9, f"{low:.0%} to {high:.0%}", ha="center", fontsize=8.5, **above)
    axes.margins(y=0.3)
    axes.grid(False)
    axes.legend(loc="center right")
    return figure


@torch.inference_mode()
def loss_by_part(
    model: Model, tokenizer: Tokenizer, examples: Iterable[dict[str, Any]], phrases: Sequence[str]
) -> tuple[float, float]:
    """(loss per token of the fixed phrases, loss per token of the rest) over the answers of `examples`.

    A token counts as fixed if any of its characters belongs to a phrase. ValueError if all are, or none.
    """
    model.eval()
    parts: dict[bool, list[float]] = {True: [], False: []}  # is it a phrase? -> losses
    for example in examples:
        whole = tokenizer.apply_chat_template(example["prompt"] + example["completion"], tokenize=False)
        tokens = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
        ids = torch.tensor(tokens["input_ids"], device=model.device)
        losses = cross_entropy(model(input_ids=ids[None]).logits[0, :-1].float(), ids[1:], reduction="none").tolist()
        answer = example["completion"][-1]["content"]
        begins = whole.rindex(answer)
        found = re.finditer("|".join(map(re.escape, phrases)), answer)
        fixed = {begins + place for phrase in found for place in range(*phrase.span())}
        for loss, (start, end) in zip(losses, tokens["offset_mapping"][1:]):
            if begins <= start < begins + len(answer):
                parts[not fixed.isdisjoint(range(start, end))].append(loss)
    if not all(parts.values()):
        raise ValueError("These answers do not hold both: a fixed phrase of yours and something else beside it.")
    return float(np.mean(parts[True])), float(np.mean(parts[False]))


# ------------------------------------------------------------------------------------------- checks of the exercises

LETTERS = 40  # scores in each trial of an interval
RESAMPLES = 20_000  # of the interval that an answer is compared with
NEAR = 0.07  # of its width: a thousand resamples end nearer, a 90 % interval does not


@exercise("a pair of two numbers, (step, ratio)", pair)
def check_step_to_keep(answer: tuple[float, float], curve: Sequence[tuple[int, float]]) -> str:
    """Is `answer` (the step to keep, perplexity at the end / perplexity at that step)? The curve's first is the untrained model."""
    best_step, best = min(curve[1:], key=lambda point: point[1])
    last = curve[-1][1]
    wanted = math.exp(last - best)
    if answer[0] != best_step:
        raise NotYet("the step to keep is the one where the validation loss is lowest, whatever came afterwards.")
    slips = [
        (last / best, "that is the ratio of the losses, and asked is the one of the perplexities."),
        (1 / wanted, "it is the other way round: the last step is the worse one."),
    ]
    otherwise = "the step is right, the ratio is not. What is a perplexity made of?"
    must_be(answer[1], wanted, slips, otherwise, within=0.02)  # it may be rounded to two digits
    return f"Right. The last step would choose, at each token, among {wanted:.1f} times as many candidates as the best step."


@exercise()
def check_stopping(answer: Callable[[list[float], int], Any]) -> str:
    """Does `answer(losses, patience)` give the number of the evaluation after which training stops, or None if it never does?"""
    lists = [list(losses) for length in range(7) for losses in product((1.0, 1.5, 2.0), repeat=length)]
    trials = [(losses, patience) for losses in lists for patience in (1, 2, 3)]  # the shortest first
    for losses, patience in trials:
        case, wanted = f"losses={losses}, patience={patience}", _stops_after(losses, patience)
        given = attempt(answer, list(losses), patience, kind=_number_or_none, where=f"for {case} ")
        if given != wanted:
            raise NotYet(f"{case} gives {given!r}, and should give {wanted}.")
    return f"Right, on {len(lists)} lists. The same rule stops the kit's runs; an equal loss is no new best."


def _number_or_none(given: Any) -> float | None:
    return None if given is None else number(given)


def _stops_after(losses: Sequence[float], patience: int) -> int | None:
    best, waited = float("inf"), 0
    for evaluation, loss in enumerate(losses, start=1):
        best, waited = (loss, 0) if loss < best else (best, waited + 1)
        if waited >= patience:
            return evaluation
    return None


@exercise()
def check_interval(answer: Callable[[list[float], list[float]], Any]) -> str:
    """Does `answer(before, after)` give the 95 % bootstrap interval of the mean improvement, pair by pair?"""
    for seed in range(3):
        chance = np.random.default_rng(seed)
        before = chance.uniform(0.0, 0.7, LETTERS)  # letters differ much from each other,
        after = before + chance.normal(0.12, 0.08, LETTERS)  # and improve by about the same amount
        hint = "it must take two lists and return (low, high); "
        low, high = attempt(answer, before.tolist(), after.tolist(), kind=pair, where=hint)
        wanted = bootstrap_interval(after - before, draws=RESAMPLES)
        width = wanted[1] - wanted[0]
        off = max(abs(low - wanted[0]), abs(high - wanted[1])) / width
        turned = max(abs(high + wanted[0]), abs(low + wanted[1])) / width
        apart = math.hypot(*(np.diff(bootstrap_interval(scores))[0] for scores in (before, after)))
        single = np.diff(np.quantile(after - before, [0.025, 0.975]))[0]
        if not off <= NEAR:
            raise NotYet.because(
                (turned <= NEAR, "the sign is turned round. An improvement is after minus before."),
                (abs(low + high - sum(wanted)) > 2 * width, "it should lie around the mean of the improvements."),
                (abs(high - low - apart) < 0.3 * apart, "these were redrawn apart from each other. They are pairs."),
                (
                    abs(high - low - single) < 0.2 * single,
                    "that is how single improvements spread, and not how their mean does.",
                ),
                otherwise=f"it is {(high - low) / width:.0%} as wide as it should be, and an end is off by {off:.0%} of that.",
            )
    return "Right. In pairs, the interval is much narrower than that of either mean: what makes one letter harder cancels out."

"""Lesson 05: four runs with a fault in three of them, what is learned first, and the checks of the exercises.

runs = faulty_runs(small, plan, model, tokenizer, training, validation)     # letter -> FaultyRun, drawn while they train
reveal(runs)                                                                # what was done to each, and the diagnosis
form, facts = loss_by_part(model, tokenizer, examples, OPENINGS)            # loss of fixed phrases, and of everything else
"""

from __future__ import annotations

import math
import random
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from math import exp
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch.nn.functional import cross_entropy
from transformers import TrainerCallback

from helpers.callbacks import TrainingStopped
from helpers.config import TrainConfig
from helpers.data.tokens import tokenize
from helpers.diagnosis import diagnose
from helpers.metrics import bootstrap_interval
from helpers.plots import BEST, MUTED, TRAIN, VALIDATION, Place, has_notebook
from helpers.runs import History
from helpers.train import build_trainer
from notebooks.lessons.scaffold import (
    NotYet,
    attempt,
    bare_axes,
    bare_figure,
    exercise,
    function,
    note,
    tidy,
)

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from helpers.plan import Plan


FEW = 4  # examples of the run that sees too few of them
# What is done to each run: (learning rate, training examples; None: all). Usual for LoRA are 1e-4 to 5e-4; these runs have a dozen
# steps and take larger ones.
FAULTS: dict[str, tuple[float, int | None]] = {
    "healthy": (1e-3, None),
    "underfit": (1e-6, None),
    "overfit": (2e-3, FEW),
    "diverged": (3e-2, None),
}
TOP = 1.35  # the charts end at so many times the untrained model's loss; what lies above gets an arrow


@dataclass
class FaultyRun:
    """One of the four. What was done to it is not printed, so that showing the object gives nothing away."""

    fault: str = field(repr=False)
    learning_rate: float = field(repr=False)
    examples: int = field(repr=False)
    history: History = field(default_factory=list, repr=False)


def faulty_runs(
    config: TrainConfig,
    plan: Plan,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    training: Dataset,
    validation: Dataset,
    seed: int = 0,
) -> dict[str, FaultyRun]:
    """Train the four runs from the same start, in an order that only the seed knows, and draw them as they go.

    Args:
        config: steps, batch and evaluations of each; its learning rate is replaced.
    """
    kinds = list(FAULTS)
    random.Random(seed).shuffle(kinds)
    runs: dict[str, FaultyRun] = {}
    place = Place()

    def redraw() -> None:
        if has_notebook():
            words = f"Training and validation loss of the runs {', '.join(runs)}, without their names"
            place.show(four_curves(runs, config.max_steps), words)

    for letter, kind in zip("ABCD", kinds):
        rate, examples = FAULTS[kind]
        chosen = training if examples is None else training.select(range(min(examples, len(training))))
        runs[letter] = FaultyRun(kind, rate, len(chosen))
        settings = replace(config, learning_rate=rate, early_stopping_patience=0)
        with tempfile.TemporaryDirectory() as folder:
            trainer = build_trainer(settings, plan, model, tokenizer, chosen, validation, folder)
            trainer.args.save_strategy, trainer.args.load_best_model_at_end = "no", False  # only the curve is wanted
            trainer.args.logging_steps = 1
            trainer.add_callback(_Writer(runs[letter].history, redraw))
            with suppress(TrainingStopped):  # the loss is no number any more (in fp16, it may be): that is the curve
                trainer.train()
    return runs


def reveal(runs: Mapping[str, FaultyRun], diagnosis: Mapping[str, str | None] | None = None) -> pd.DataFrame:
    """One row per run: what the learner said, what was done to it, and the verdict on its curve.

    Args:
        diagnosis: letter -> the learner's word, None where there is none yet.
    """
    said = diagnosis or {}
    rows = [
        {
            "run": letter,
            "you said": said.get(letter) or "?",
            "it is": run.fault,
            "learning rate": f"{run.learning_rate:g}",
            "training examples": run.examples,
            "the verdict on its curve": str(diagnose(run.history)),
        }
        for letter, run in runs.items()
    ]
    return pd.DataFrame(rows).set_index("run")


def four_curves(runs: Mapping[str, FaultyRun], steps: int) -> Figure:
    """Training and validation loss of up to four runs on the same axes limits, with letters instead of names."""
    figure = bare_figure(7.6, 5.6)
    panels = figure.subplots(2, 2, sharex=True, sharey=True)
    first = [event["eval_loss"] for run in runs.values() for event in run.history[:1] if event.get("eval_loss")]
    top = TOP * max(first, default=1.0)
    for axes, letter in zip(panels.flat, "ABCD"):
        tidy(axes).set_title(f"run {letter}", loc="left", fontsize=10.5)
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
    figure, axes = bare_axes(7.2, 2.9)
    axes.grid(False)
    highest = 0.0
    for (label, values), color in zip(means.items(), (MUTED, BEST)):
        counts, _, _ = axes.hist(values, bins=25, range=(0, 1), color=color, alpha=0.75, edgecolor="white", label=label)
        highest = max(highest, counts.max())
    for (low, high), color in zip(intervals.values(), (MUTED, BEST)):
        axes.plot([low, high], [highest * 1.08] * 2, color=color, linewidth=5, solid_capstyle="butt")
        words, middle = f"{low:.0%} to {high:.0%}", (low + high) / 2
        note(axes, words, (middle, highest * 1.12), (0, 0), ha="center", va="bottom")
    axes.set_ylim(0, highest * 1.3)
    axes.set_xlim(-0.04, 1.04)
    axes.set(xlabel="mean score of the redrawn letters", ylabel="drawings")
    axes.legend(frameon=False, loc="center right")
    return figure


def _draw(axes: Axes, history: History, top: float) -> None:
    for key, color, label, marker in (
        ("loss", TRAIN, "training loss", "."),
        ("eval_loss", VALIDATION, "validation loss", "o"),
    ):
        points = [(event["step"], event[key]) for event in history if event.get(key) is not None]
        if points:
            axes.plot(*zip(*points), color=color, linewidth=1.7, marker=marker, markersize=5, label=label)
    losses = [event["loss"] for event in history if event.get("loss") is not None]
    if any("loss" in event and event["loss"] is None for event in history):
        _above(axes, "not a number")
    elif losses and max(losses) > top:
        _above(axes, f"up to {max(losses):.0f}")


def _above(axes: Axes, words: str) -> None:
    arrow = {"arrowstyle": "->", "color": TRAIN}
    looks = {"xycoords": "axes fraction", "ha": "right", "fontsize": 9, "color": TRAIN, "arrowprops": arrow}
    axes.annotate(words, (0.98, 1.0), xytext=(0.98, 0.84), **looks)


class _Writer(TrainerCallback):
    """Notes each loss (None where it is no number), and has the picture drawn at each validation point."""

    def __init__(self, history: History, redraw: Callable[[], None]) -> None:
        self.history, self.redraw = history, redraw

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        losses = {key: (logs or {})[key] for key in ("loss", "eval_loss") if key in (logs or {})}
        event = {key: value if math.isfinite(value) else None for key, value in losses.items()}
        if event:
            self.history.append({"step": state.global_step, **event})
        if "eval_loss" in event:
            self.redraw()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.redraw()


@torch.inference_mode()
def loss_by_part(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Iterable[dict[str, Any]],
    phrases: Sequence[str],
) -> tuple[float, float]:
    """(loss per token of the fixed phrases, loss per token of the rest) over the answers of `examples`.

    Args:
        examples: `prompt` and `completion` messages.
        phrases: texts that every answer contains; each counts where it is first found, one after the other.

    Raises:
        ValueError: no token of any answer belongs to a phrase, or none to the rest.
    """
    was_training = model.training
    model.eval()
    fixed, other = [], []
    try:
        for example in examples:
            whole = tokenizer.apply_chat_template(example["prompt"] + example["completion"], tokenize=False)
            places = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
            answer = example["completion"][-1]["content"]
            first = whole.rindex(answer)
            ids = torch.tensor(tokenize([example], tokenizer)[0].ids, device=model.device)
            losses = cross_entropy(
                model(input_ids=ids[None]).logits[0, :-1].float(), ids[1:], reduction="none"
            ).tolist()
            parts = spans(answer, phrases)
            for loss, (start, end) in zip(losses, places[1:]):
                if first <= start < first + len(answer):
                    inside = any(since < end - first and start - first < until for since, until in parts)
                    (fixed if inside else other).append(loss)
    finally:
        model.train(was_training)
    if not fixed or not other:
        raise ValueError("These answers do not hold both: a fixed phrase of yours and something else beside it.")
    return sum(fixed) / len(fixed), sum(other) / len(other)


def spans(answer: str, phrases: Sequence[str]) -> list[tuple[int, int]]:
    """(start, end) in characters of each phrase, looked for in order; a phrase that is not there has none."""
    found, since = [], 0
    for phrase in phrases:
        start = answer.find(phrase, since)
        if start >= 0:
            since = start + len(phrase)
            found.append((start, since))
    return found


# ------------------------------------------------------------------------------------------- checks of the exercises

NEAR = 0.02  # a ratio may be rounded to two digits
TRIALS = 200  # random lists of validation losses that a stopping rule is tried on
LETTERS = 40  # scores in each trial of an interval


@exercise("a pair of two numbers, (step, ratio)")
def check_step_to_keep(answer: Any, curve: Sequence[tuple[int, float]]) -> str:
    """Is `answer` (the step to keep, perplexity at the end / perplexity at that step)?

    Args:
        curve: (step, validation loss); the first is the untrained model.
    """
    try:
        step, ratio = (float(value) for value in answer)
    except (TypeError, ValueError):
        raise NotYet("the answer is a pair of two numbers, (step, ratio).") from None
    best_step, best = min(curve[1:], key=lambda point: point[1])
    last = curve[-1][1]
    wanted = exp(last - best)
    if step != best_step:
        raise NotYet("the step to keep is the one where the validation loss is lowest, whatever came afterwards.")
    if abs(ratio - wanted) <= NEAR:
        return f"Right. The last step would choose, at each token, among {wanted:.1f} times as many candidates as the best step."
    raise NotYet.because(
        (abs(ratio - last / best) <= NEAR, "that is the ratio of the losses. Perplexity is exp(loss); divide those."),
        (abs(ratio - 1 / wanted) <= NEAR, "it is the other way round: the last step is the worse one."),
        otherwise="the step is right. For the ratio, take exp() of both losses and divide the last by the best.",
    )


@exercise("the function itself, without brackets", function)
def check_stopping(answer: Callable[[list[float], int], Any]) -> str:
    """Does `answer(losses, patience)` give the number of the evaluation after which training stops, or None if it never does?"""
    chance = random.Random(0)
    trials = [([3.0, 2.0, 2.1, 2.2, 1.9], 2), ([3.0, 2.0, 2.1, 1.9, 2.0, 2.1], 2), ([3.0, 2.0, 1.0], 1)]
    trials += [([2.0, 2.0, 2.0], 2), ([], 1)]
    for _ in range(TRIALS):
        losses = [chance.choice([1.0, 1.5, 2.0, 2.5]) for _ in range(chance.randint(1, 9))]
        trials.append((losses, chance.randint(1, 4)))
    for losses, patience in trials:
        case = f"losses={losses}, patience={patience}"
        given = attempt(lambda losses=losses, patience=patience: answer(list(losses), patience), f"for {case} ")
        if isinstance(given, bool) or given != _stops_after(losses, patience):
            rule = "Count evaluations that are not below the best so far, from 0 again at each new best"
            raise NotYet(f"{case} gives {given!r}. {rule}; count from 1.")
    return f"Right, on {len(trials)} lists. The same rule stops the kit's runs; an equal loss is no new best."


def _stops_after(losses: Sequence[float], patience: int) -> int | None:
    best, waited = float("inf"), 0
    for number, loss in enumerate(losses, start=1):
        best, waited = (loss, 0) if loss < best else (best, waited + 1)
        if waited >= patience:
            return number
    return None


@exercise("the function itself, without brackets", function)
def check_interval(answer: Callable[[list[float], list[float]], Any]) -> str:
    """Does `answer(before, after)` give the 95 % bootstrap interval of the mean improvement, pair by pair?"""
    for seed in range(3):
        before, after = _scores(seed)
        low, high = attempt(
            lambda pair=(before, after): [float(value) for value in answer(pair[0].tolist(), pair[1].tolist())][:2],
            "it must take two lists and return (low, high); ",
        )
        wanted = bootstrap_interval(after - before)
        if not _near((low, high), wanted):
            raise _interval_hint(before, after, (low, high), wanted)
    return "Right. In pairs, the interval is much narrower than that of either mean: what makes one letter harder cancels out."


def _scores(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Letters that differ much from each other, and improve by about the same amount."""
    chance = np.random.default_rng(seed)
    before = chance.uniform(0.0, 0.7, LETTERS)
    return before, before + chance.normal(0.12, 0.08, LETTERS)


def _near(found: tuple[float, float], wanted: tuple[float, float], share: float = 0.3) -> bool:
    """Both ends within `share` of the width: a bootstrap of another seed lies well within."""
    allowed = share * (wanted[1] - wanted[0])
    return bool(abs(found[0] - wanted[0]) <= allowed and abs(found[1] - wanted[1]) <= allowed)


def _interval_hint(
    before: np.ndarray, after: np.ndarray, found: tuple[float, float], wanted: tuple[float, float]
) -> NotYet:
    (low, high), width, apart = found, wanted[1] - wanted[0], _unpaired_width(before, after)
    off_center = abs((low + high) / 2 - sum(wanted) / 2) > width
    return NotYet.because(
        (_near((-high, -low), wanted), "the sign is turned round. An improvement is after minus before."),
        (off_center, "the interval should lie around the mean of the differences, after minus before."),
        (abs((high - low) - apart) < 0.3 * apart, "these were redrawn apart from each other. They are pairs."),
        (high - low > apart, "that is how single differences spread. Redraw, take the mean, many times."),
        otherwise="the ends are off. Redraw as many as there are, with replacement, take the mean, thousands of times.",
    )


def _unpaired_width(before: np.ndarray, after: np.ndarray, draws: int = 2000) -> float:
    chance = np.random.default_rng(0)
    redrawn = [scores[chance.integers(0, LETTERS, (draws, LETTERS))].mean(axis=1) for scores in (after, before)]
    low, high = np.quantile(redrawn[0] - redrawn[1], [0.025, 0.975])
    return float(high - low)

"""Four short runs for lesson 05, each with another fault planted (one with none), shown without their names until they are named.

runs = faulty_runs(small, plan, model, tokenizer, training, validation)     # letter -> PlantedRun, drawn while they train
reveal(runs)                                                                 # what was done to each, and the verdict

What is learned first, the form or the facts? The loss of an answer's fixed phrases beside the loss of everything else.

form, facts = loss_by_part(model, tokenizer, examples, OPENINGS)

Checks for lesson 05: the step to keep, a rule that stops, and an interval for an improvement.
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
from helpers.diagnosis import verdict
from helpers.live import has_notebook
from helpers.metrics import bootstrap_interval
from helpers.plots import BEST, MUTED, TRAIN, VALIDATION, Place
from helpers.runs import History
from helpers.train import build_trainer

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from helpers.plan import Plan


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


def faulty_runs(
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
    for (label, values), color in zip(means.items(), (MUTED, BEST)):
        counts, _, _ = axes.hist(values, bins=25, range=(0, 1), color=color, alpha=0.75, edgecolor="white", label=label)
        highest = max(highest, counts.max())
    for (low, high), color in zip(intervals.values(), (MUTED, BEST)):
        axes.plot([low, high], [highest * 1.08] * 2, color=color, linewidth=5, solid_capstyle="butt")
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


NEAR = 0.02  # a ratio may be rounded to two digits
LISTS = 200  # of random validation losses that a stopping rule is tried on
LETTERS = 40  # scores in each trial of an interval


def check_step_to_keep(answer: Any, curve: Sequence[tuple[int, float]]) -> None:
    """Is `answer` (the step to keep, perplexity at the end / perplexity at that step)?

    Args:
        curve: (step, validation loss); the first is the untrained model.
    """
    if answer is None:
        return print("Your turn: replace None by a pair, (step, ratio).")
    try:
        step, ratio = (float(value) for value in answer)
    except (TypeError, ValueError):
        return print("Not yet: the answer is a pair of two numbers, (step, ratio).")
    best_step, best = min(curve[1:], key=lambda point: point[1])
    last = curve[-1][1]
    if step != best_step:
        return print(
            "Not yet: the step to keep is the one where the validation loss is lowest, whatever training did afterwards."
        )
    wanted = exp(last - best)
    if abs(ratio - last / best) <= NEAR and abs(ratio - wanted) > NEAR:
        return print("Not yet: that is the ratio of the losses. Perplexity is exp(loss); divide those.")
    if abs(ratio - 1 / wanted) <= NEAR and abs(ratio - wanted) > NEAR:
        return print("Not yet: it is the other way round. The last step is the worse one, so the ratio is above 1.")
    if not abs(ratio - wanted) <= NEAR:
        return print(
            "Not yet: the step is right. For the ratio, take exp() of both losses and divide the last by the best."
        )
    print(
        f"Right. Keeping the last step would mean to choose, at each token, among {wanted:.1f} times as many candidates as the best step."
    )


def check_stopping(answer: Any) -> None:
    """Does `answer(losses, patience)` give the number of the evaluation after which training stops, or None if it never does?"""
    if answer is None:
        return print("Your turn: write the function, then hand it to the check.")
    if not callable(answer):
        return print("Not yet: the check needs the function itself, without brackets.")
    chance = random.Random(0)
    trials = [
        ([3.0, 2.0, 2.1, 2.2, 1.9], 2),
        ([3.0, 2.0, 2.1, 1.9, 2.0, 2.1], 2),
        ([3.0, 2.0, 1.0], 1),
        ([2.0, 2.0, 2.0], 2),
        ([], 1),
    ]
    trials += [
        ([chance.choice([1.0, 1.5, 2.0, 2.5]) for _ in range(chance.randint(1, 9))], chance.randint(1, 4))
        for _ in range(LISTS)
    ]
    for losses, patience in trials:
        try:
            given = answer(list(losses), patience)
        except Exception as error:
            return print(
                f"Not yet: for losses={losses}, patience={patience} your function raises {type(error).__name__}: {error}."
            )
        wanted = _stops_after(losses, patience)
        if isinstance(given, bool) or given != wanted:
            return print(
                f"Not yet: losses={losses}, patience={patience} gives {given!r}. Count the evaluations in a row that are not below the "
                "best so far, set the count back to 0 at each new best, and number the evaluations from 1."
            )
    print(f"Right, on {len(trials)} lists. The same rule stops the kit's runs; an equal loss is no new best.")


def check_interval(answer: Any) -> None:
    """Does `answer(before, after)` give the 95 % bootstrap interval of the mean improvement, pair by pair?"""
    if answer is None:
        return print("Your turn: write the function, then hand it to the check.")
    if not callable(answer):
        return print("Not yet: the check needs the function itself, without brackets.")
    for seed in range(3):
        before, after = _scores(seed)
        try:
            low, high = (float(value) for value in answer(before.tolist(), after.tolist()))
        except Exception as error:
            return print(
                f"Not yet: your function must take two lists and return (low, high); {type(error).__name__}: {error}."
            )
        wanted = bootstrap_interval(after - before)
        if _near((low, high), wanted):
            continue
        return print(f"Not yet: {_hint(before, after, (low, high), wanted)}")
    print(
        "Right. In pairs, the interval is much narrower than that of either mean: what makes one letter harder than another cancels out."
    )


def _stops_after(losses: Sequence[float], patience: int) -> int | None:
    best, waited = float("inf"), 0
    for number, loss in enumerate(losses, start=1):
        best, waited = (loss, 0) if loss < best else (best, waited + 1)
        if waited >= patience:
            return number
    return None


def _scores(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Letters that differ much from each other, and improve by about the same amount."""
    chance = np.random.default_rng(seed)
    before = chance.uniform(0.0, 0.7, LETTERS)
    return before, before + chance.normal(0.12, 0.08, LETTERS)


def _near(found: tuple[float, float], wanted: tuple[float, float], share: float = 0.3) -> bool:
    """Both ends within `share` of the width: a bootstrap of another seed lies well within."""
    allowed = share * (wanted[1] - wanted[0])
    return bool(abs(found[0] - wanted[0]) <= allowed and abs(found[1] - wanted[1]) <= allowed)


def _hint(before: np.ndarray, after: np.ndarray, found: tuple[float, float], wanted: tuple[float, float]) -> str:
    low, high = found
    if _near((-high, -low), wanted):
        return "the sign is turned round. An improvement is after minus before."
    center = (low + high) / 2
    if abs(center - (wanted[0] + wanted[1]) / 2) > wanted[1] - wanted[0]:
        return "the interval should lie around the mean of the differences, after minus before."
    apart = _unpaired_width(before, after)
    if abs((high - low) - apart) < 0.3 * apart:
        return "before and after were redrawn apart from each other. They are pairs: redraw the differences, or the same letters for both."
    if high - low > apart:
        return "that is how the single differences spread. Wanted is how their mean would: redraw the letters, take the mean, many times."
    return "the ends are off. Redraw as many differences as there are, with replacement, take the mean, and do that thousands of times."


def _unpaired_width(before: np.ndarray, after: np.ndarray, draws: int = 2000) -> float:
    chance = np.random.default_rng(0)

    def mean_of(values: np.ndarray) -> np.ndarray:
        return values[chance.integers(0, len(values), (draws, len(values)))].mean(axis=1)

    low, high = np.quantile(mean_of(after) - mean_of(before), [0.025, 0.975])
    return float(high - low)

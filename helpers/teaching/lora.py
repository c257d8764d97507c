"""Lesson 02: a training loop short enough to repeat for several ranks, and the chart that compares them.

result = short_training(model, tokenizer, training, validation, steps=10)
picture(rank_chart({16: result}), "Loss by rank")
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from datasets import Dataset
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from helpers.charts import MUTED
from helpers.data.tokens import MASKED, Tokens, tokenize
from helpers.teaching.precision import mixed_precision

MARKERS = "osD^vPX*"  # colour alone would be lost in print
LARGEST_GRADIENT = 1.0  # longer ones are shortened to this, as the trainer of lesson 04 does


@dataclass
class ShortRun:
    """What a short training left: losses per answer token, and seconds."""

    training: list[float] = field(default_factory=list)
    """One for each step, on the examples of that step, before it."""
    before: float = 0.0
    after: float = 0.0
    """Validation loss before the first and after the last step."""
    seconds: float = 0.0


def short_examples(examples: Dataset, tokenizer: PreTrainedTokenizerBase, count: int) -> list[Tokens]:
    """The `count` shortest examples as tokens and labels, in their original order: a step on those is quick."""
    tokens = tokenize(examples, tokenizer)
    chosen = sorted(range(len(tokens)), key=lambda number: len(tokens[number].ids))[:count]
    return [tokens[number] for number in sorted(chosen)]


def short_training(
    model: PeftModel,
    training: Sequence[Tokens],
    validation: Sequence[Tokens],
    steps: int,
    batch: int = 2,
    learning_rate: float = 1e-3,
) -> ShortRun:
    """Train the adapter of `model` for a few steps: the bare loop, without anything that a real run needs (lesson 04 has that).

    Examples are taken in order, `batch` for each step, from the start again when they are used up: the same for every rank.
    """
    run, started = ShortRun(before=validation_loss(model, validation)), time.perf_counter()
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=learning_rate)
    model.train()
    for step in range(steps):
        examples = [training[(step * batch + place) % len(training)] for place in range(batch)]
        answer_tokens = sum(_trained(example) for example in examples)
        total = 0.0
        for example in examples:  # one after the other: the gradients add up to those of the whole batch
            with mixed_precision(model) as scale:
                loss = _summed_loss(model, example) / answer_tokens
            (scale * loss).backward()
            total += loss.item()
        for weight in weights:
            weight.grad /= scale
        torch.nn.utils.clip_grad_norm_(weights, LARGEST_GRADIENT)
        optimizer.step()
        optimizer.zero_grad()
        run.training.append(total)
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # a card may still be at work when Python has gone on
    run.seconds = time.perf_counter() - started
    run.after = validation_loss(model, validation)
    return run


@torch.no_grad()
def validation_loss(model: PreTrainedModel | PeftModel, examples: Sequence[Tokens]) -> float:
    """Mean loss over all answer tokens of `examples`."""
    was_training = model.training
    model.eval()
    with mixed_precision(model):
        losses = [_summed_loss(model, example).item() for example in examples]
    model.train(was_training)
    return sum(losses) / sum(_trained(example) for example in examples)


def _summed_loss(model: torch.nn.Module, example: Tokens) -> torch.Tensor:
    """Loss of one example, added up over its answer's tokens. Logits are computed only where the answer is."""
    device = next(model.parameters()).device
    ids = torch.tensor([example.ids], device=device)
    labels = torch.tensor(example.labels[1:], device=device)  # position i predicts token i + 1
    first = int((labels != MASKED).nonzero()[0])
    kept = len(labels) - first
    logits = model(input_ids=ids, logits_to_keep=kept + 1).logits[0, :-1].float()
    return cross_entropy(logits, labels[first:], ignore_index=MASKED, reduction="sum")


def _trained(example: Tokens) -> int:
    return sum(label != MASKED for label in example.labels[1:])


def rank_chart(runs: Mapping[int, ShortRun]) -> Figure:
    """Training loss by step, one line per rank, beside the validation loss that each rank ended with.

    Args:
        runs: rank -> what its training left.
    """
    figure = Figure(figsize=(7.6, 3.5), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for number, (rank, run) in enumerate(runs.items()):
        marker, colour = MARKERS[number % len(MARKERS)], f"C{number}"
        left.plot(
            range(1, len(run.training) + 1),
            run.training,
            marker=marker,
            markersize=4,
            linewidth=1.6,
            label=f"rank {rank}",
        )
        right.plot([rank], [run.after], marker=marker, markersize=8, color=colour, linestyle="none")
        right.annotate(
            f"{run.after:.2f}", (rank, run.after), xytext=(0, 9), textcoords="offset points", ha="center", fontsize=8.5
        )
    right.plot(list(runs), [run.after for run in runs.values()], color=MUTED, linewidth=1, zorder=0)
    before = next(iter(runs.values())).before
    right.axhline(before, color=MUTED, linestyle=":", linewidth=1.2)
    right.annotate(
        f"untrained: {before:.2f}",
        (1, before),
        xycoords=("axes fraction", "data"),
        xytext=(0, -4),
        textcoords="offset points",
        ha="right",
        va="top",
        fontsize=8.5,
        color=MUTED,
    )
    right.set_xscale("log", base=2)
    right.set_xticks(list(runs), [str(rank) for rank in runs])
    right.set_ylim(0, before * 1.08)
    right.margins(x=0.15)
    left.set_ylim(bottom=0)
    left.set_xlabel("optimizer step")
    left.set_ylabel("training loss per answer token")
    right.set_xlabel("rank")
    right.set_ylabel("validation loss after the last step")
    left.legend(frameon=False, loc="lower left")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
    return figure


def shapes_chart(outputs: int, inputs: int, rank: int) -> Figure:
    """The frozen matrix W beside B and A, drawn to scale: the area is the number of weights."""
    gap = 0.5 * inputs
    figure = Figure(figsize=(7.2, 2.9), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    pieces = [
        ("W, frozen", 0.0, inputs, outputs, MUTED),
        ("B", inputs + gap, rank, outputs, "#4c78a8"),
        ("A", inputs + 2 * gap + rank, inputs, rank, "#e45756"),
    ]
    for name, left, width, height, colour in pieces:
        axes.add_patch(Rectangle((left, -height), width, height, color=colour, linewidth=0))
        inside = width > gap and height > gap
        place = (left + width / 2, -height / 2) if inside else (left + width / 2, -height - 0.04 * outputs)
        words = f"{name}\n{height:,} x {width:,} = {height * width:,}"
        axes.annotate(
            words, place, ha="center", va="center" if inside else "top", fontsize=9, color="white" if inside else colour
        )
    for sign, place in [("+ (alpha/r) ·", inputs + gap / 2), ("·", inputs + 1.5 * gap + rank)]:
        axes.annotate(sign, (place, -outputs / 2), ha="center", va="center", fontsize=11)
    axes.set_xlim(-0.02 * inputs, 2 * inputs + 2.1 * gap + rank)
    axes.set_ylim(-1.2 * outputs, 0.05 * outputs)
    axes.set_aspect("equal")
    axes.axis("off")
    return figure

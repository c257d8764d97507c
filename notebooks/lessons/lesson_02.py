"""Lesson 02: a training loop short enough to repeat for several ranks, its charts, and the checks of the exercises.

result = short_training(model, training, validation, steps=10)
picture(rank_chart({16: result}), "Loss by rank")
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from helpers.data.tokens import MASKED, Tokens, tokenize
from helpers.plots import MARKERS, MUTED
from helpers.registry import CATALOG
from notebooks.lessons.scaffold import (
    NotYet,
    attempt,
    bare_axes,
    bare_figure,
    exercise,
    function,
    mixed_precision,
    note,
    number,
    tidy,
)

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
    figure = bare_figure(7.6, 3.5)
    left, right = (tidy(axes) for axes in figure.subplots(1, 2, width_ratios=(3, 2)))
    for (rank, run), marker in zip(runs.items(), MARKERS):
        steps = range(1, len(run.training) + 1)
        [line] = left.plot(steps, run.training, marker=marker, markersize=4, linewidth=1.6, label=f"rank {rank}")
        right.plot([rank], [run.after], marker=marker, markersize=8, color=line.get_color(), linestyle="none")
        note(right, f"{run.after:.2f}", (rank, run.after), (0, 9), ha="center")
    right.plot(list(runs), [run.after for run in runs.values()], color=MUTED, linewidth=1, zorder=0)
    before = next(iter(runs.values())).before
    right.axhline(before, color=MUTED, linestyle=":", linewidth=1.2)
    looks = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "top", "color": MUTED}
    note(right, f"untrained: {before:.2f}", (1, before), (0, -4), **looks)
    right.set_xscale("log", base=2)
    right.set_xticks(list(runs), [str(rank) for rank in runs])
    right.set_ylim(0, before * 1.08)
    right.margins(x=0.15)
    left.set_ylim(bottom=0)
    left.set(xlabel="optimizer step", ylabel="training loss per answer token")
    right.set(xlabel="rank", ylabel="validation loss after the last step")
    left.legend(frameon=False, loc="lower left")
    return figure


def shapes_chart(outputs: int, inputs: int, rank: int) -> Figure:
    """The frozen matrix W beside B and A, drawn to scale: the area is the number of weights."""
    gap = 0.5 * inputs
    figure, axes = bare_axes(7.2, 2.9)
    pieces = [
        ("W, frozen", 0.0, inputs, outputs, MUTED),
        ("B", inputs + gap, rank, outputs, "#4c78a8"),
        ("A", inputs + 2 * gap + rank, inputs, rank, "#e45756"),
    ]
    for name, left, width, height, color in pieces:
        axes.add_patch(Rectangle((left, -height), width, height, color=color, linewidth=0))
        inside = width > gap and height > gap
        place = (left + width / 2, -height / 2) if inside else (left + width / 2, -height - 0.04 * outputs)
        words = f"{name}\n{height:,} x {width:,} = {height * width:,}"
        axes.annotate(
            words, place, ha="center", va="center" if inside else "top", fontsize=9, color="white" if inside else color
        )
    for sign, place in [("+ (alpha/r) ·", inputs + gap / 2), ("·", inputs + 1.5 * gap + rank)]:
        axes.annotate(sign, (place, -outputs / 2), ha="center", va="center", fontsize=11)
    axes.set_xlim(-0.02 * inputs, 2 * inputs + 2.1 * gap + rank)
    axes.set_ylim(-1.2 * outputs, 0.05 * outputs)
    axes.set_aspect("equal")
    axes.axis("off")
    return figure


SHAPES = [(6, 4, 2, 8), (3, 7, 1, 1), (5, 5, 3, 6)]  # (outputs, inputs, rank, alpha)
NEAR = 1e-4
AS_GOOD_AS = 1.001  # times the smallest error that is possible


@exercise("a whole number of parameters", number)
def check_trainable(
    answer: float, model: str = "Llama-3.1-8B-Instruct", r: int = 8, layers: tuple[str, ...] = ("q_proj", "v_proj")
) -> str:
    """Is `answer` the number of trainable parameters of a LoRA adapter with rank `r` on these layers of a model of the menu?"""
    shape = CATALOG[model].shape
    wanted, deep = shape.lora_parameters(r, list(layers)), shape.num_hidden_layers
    if answer == wanted:
        share = wanted / shape.parameters()
        return f"Right. That is {share:.3%} of the model: two thin matrices for each chosen layer, and no other."
    sizes = [shape.linear_layers()[layer] for layer in layers]
    slips = {
        wanted // deep: "that is one transformer layer. How many does the model have?",
        shape.lora_parameters(r): "that is for all linear layers; only two of them are asked for here.",
        deep * sum(i * o for i, o in sizes): "that is the size of the layers themselves. Which matrices learn?",
        deep * r * sum(i for i, _ in sizes): "A alone, without B.",
        deep * r * sum(o for _, o in sizes): "B alone, without A.",
        deep * r * sum(2 * i for i, _ in sizes): "v_proj is not square: look at its (in, out).",
        shape.lora_parameters(1, list(layers)): "that would be rank 1.",
    }
    what = "A has r x in numbers and B has out x r, for each chosen layer of each transformer layer."
    raise NotYet(slips.get(int(answer), what))


@exercise("the function itself, without brackets", function)
def check_lora_layer(answer: Callable[..., Any]) -> str:
    """Does `answer(x, weight, a, b, alpha, rank)` give what a LoRA layer gives?"""
    chance = torch.Generator().manual_seed(0)
    for outputs, inputs, rank, alpha in SHAPES:
        shapes = [(2, 3, inputs), (outputs, inputs), (rank, inputs), (outputs, rank)]
        x, weight, a, b = (torch.randn(shape, generator=chance) for shape in shapes)
        before, case = weight.clone(), (x, weight, a, b, alpha, rank)
        given = attempt(lambda case=case: _tensor(answer(*case)), f"with W {outputs} x {inputs} and rank {rank}, ")
        plain, learned = x @ before.T, x @ a.T @ b.T
        wanted = plain + alpha / rank * learned
        if not torch.equal(weight, before):
            raise NotYet("your function changes W. It is frozen: add to the layer's output instead.")
        if given.shape != wanted.shape:
            raise NotYet(f"the output has shape {tuple(wanted.shape)}, yours has {tuple(given.shape)}.")
        if not torch.allclose(given, wanted, atol=NEAR):
            raise _layer_hint(given, plain, learned, alpha, rank)
    return "Right, for three shapes. The pair never becomes a large matrix here: x goes through A, which makes it short, and then through B."


def _tensor(value: Any) -> torch.Tensor:
    return torch.as_tensor(value, dtype=torch.float32, device="cpu")


def _layer_hint(given: torch.Tensor, plain: torch.Tensor, learned: torch.Tensor, alpha: float, rank: int) -> NotYet:
    slips = [
        (plain, "that is the frozen layer alone."),
        (alpha / rank * learned, "that is the adapter alone; the frozen layer's output belongs to it."),
        (plain + learned, "the scale is missing."),
        (plain + alpha * learned, "alpha is divided by something first."),
        (alpha / rank * (plain + learned), "the scale is for the adapter only, not for W."),
    ]
    found = [(torch.allclose(given, slip, atol=NEAR), hint) for slip, hint in slips]
    return NotYet.because(*found, otherwise="the values are not right. The output is x Wᵀ + (alpha / r) x Aᵀ Bᵀ.")


@exercise("the function itself, without brackets", function)
def check_best_pair(answer: Callable[[torch.Tensor, int], Any], rank: int = 3) -> str:
    """Does `answer(change, rank)` give (b, a) of that rank whose product is as near to `change` as any can be?"""
    chance = torch.Generator().manual_seed(0)
    for outputs, inputs in [(12, 8), (6, 15)]:
        change = torch.randn((outputs, inputs), generator=chance)
        case = f"with a change of {outputs} x {inputs}, "
        b, a = attempt(lambda change=change: _pair(answer(change.clone(), rank)), case)
        if b.shape != (outputs, rank) or a.shape != (rank, inputs):
            found = f"yours are {tuple(b.shape)} and {tuple(a.shape)}"
            raise NotYet(f"{case}B is {outputs} x {rank} and A is {rank} x {inputs}; {found}.")
        smallest, error = torch.linalg.svdvals(change)[rank:].norm(), (change - b @ a).norm()
        if not error <= AS_GOOD_AS * smallest:
            missed, possible = error / change.norm(), smallest / change.norm()
            hint = _pair_hint(change, rank, b @ a)
            raise NotYet(f"your product misses {missed:.0%} of the change, and {possible:.0%} is possible. {hint}")
    return "Right: no pair of this rank is nearer. Training finds its pair by small steps instead, without ever seeing the change it looks for."


def _pair(given: Any) -> tuple[torch.Tensor, torch.Tensor]:
    b, a = given
    return _tensor(b), _tensor(a)


def _pair_hint(change: torch.Tensor, rank: int, product: torch.Tensor) -> str:
    u, sizes, v = torch.linalg.svd(change, full_matrices=False)
    kept, last = slice(None, rank), slice(-rank, None)
    squared = (u[:, kept] * sizes[kept] ** 2) @ v[kept]
    if torch.allclose(product, u[:, kept] @ v[kept], atol=NEAR):
        return "The singular values are missing."
    if torch.allclose(product, squared, atol=NEAR):
        return "The singular values belong to one of the two matrices, or their roots to both."
    if torch.allclose(product, (u[:, last] * sizes[last]) @ v[last], atol=NEAR):
        return "Those are the smallest parts. Keep the largest."
    return "torch.linalg.svd writes a matrix as a sum of rank-1 parts, largest first."

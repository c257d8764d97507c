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
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase

from helpers.data.tokens import MASKED, Tokens, tokenize
from helpers.plots import MARKERS, MUTED, TRAIN, VALIDATION
from helpers.registry import CATALOG
from notebooks.lessons.scaffold import (
    NotYet,
    attempt,
    chart,
    exercise,
    level,
    lora_trials,
    mixed_precision,
    must_be,
    number,
)

Examples = Sequence[Tokens]


@dataclass
class ShortRun:
    """What a short training left: loss per answer token of each step's examples and of the validation part, and seconds."""

    training: list[float] = field(default_factory=list)
    before: float = 0.0
    after: float = 0.0
    seconds: float = 0.0


def short_examples(examples: Dataset, tokenizer: PreTrainedTokenizerBase, count: int) -> list[Tokens]:
    """The `count` shortest examples as tokens and labels, in their original order: a step on those is quick."""
    tokens = tokenize(examples, tokenizer)
    chosen = sorted(range(len(tokens)), key=lambda number: len(tokens[number].ids))[:count]
    return [tokens[number] for number in sorted(chosen)]


def short_training(
    model: PeftModel, training: Examples, validation: Examples, steps: int, batch: int = 2, learning_rate: float = 1e-3
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
        answer_tokens = sum(example.trained for example in examples)
        total = 0.0
        for example in examples:  # one after the other: the gradients add up to those of the whole batch
            with mixed_precision(model) as scale:
                loss = _summed_loss(model, example) / answer_tokens
            (scale * loss).backward()
            total += loss.item()
        for weight in weights:
            weight.grad /= scale
        torch.nn.utils.clip_grad_norm_(weights, 1.0)  # longer gradients are shortened, as by the trainer of lesson 04
        optimizer.step()
        optimizer.zero_grad()
        run.training.append(total)
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # a card may still be at work when Python has gone on
    run.seconds = time.perf_counter() - started
    run.after = validation_loss(model, validation)
    return run


@torch.no_grad()
def validation_loss(model: PeftModel, examples: Examples) -> float:
    """Mean loss over all answer tokens of `examples`."""
    model.eval()
    with mixed_precision(model):
        losses = [_summed_loss(model, example).item() for example in examples]
    return sum(losses) / sum(example.trained for example in examples)


def _summed_loss(model: torch.nn.Module, example: Tokens) -> torch.Tensor:
    """Loss of one example, added up over its answer's tokens. Logits are computed only where the answer is."""
    ids, labels = (torch.tensor(part, device=model.device) for part in example)
    first = int((labels != MASKED).nonzero()[0])  # position i predicts token i + 1
    logits = model(input_ids=ids[None], logits_to_keep=len(ids) - first + 1).logits[0, :-1].float()
    return cross_entropy(logits, labels[first:], ignore_index=MASKED, reduction="sum")


@chart
def rank_chart(runs: Mapping[int, ShortRun]) -> Figure:
    """Training loss by step, one line per rank (the keys of `runs`), beside the validation loss that each ended with."""
    figure = Figure(figsize=(7.6, 3.5))
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for (rank, run), marker in zip(runs.items(), MARKERS):
        [line] = left.plot(range(1, len(run.training) + 1), run.training, marker=marker, ms=4, label=f"rank {rank}")
        right.plot(rank, run.after, marker=marker, markersize=8, color=line.get_color())
        place, looks = (rank, run.after), {"textcoords": "offset points", "ha": "center", "fontsize": 8.5}
        right.annotate(f"{run.after:.2f}", place, (0, 9), **looks)
    right.plot(list(runs), [run.after for run in runs.values()], color=MUTED, linewidth=1, zorder=0)
    before = next(iter(runs.values())).before
    level(right, before, f"untrained: {before:.2f}")
    right.set_xscale("log", base=2)
    right.set_xticks(list(runs), list(runs))
    right.margins(x=0.15)
    right.set(xlabel="rank", ylabel="validation loss after the last step", ylim=(0, before * 1.08))
    left.set(xlabel="optimizer step", ylabel="training loss per answer token", ylim=(0, None))
    left.legend(loc="lower left")
    return figure


@chart
def shapes_chart(outputs: int, inputs: int, rank: int) -> Figure:
    """The frozen matrix W beside B and A, drawn to scale: the area is the number of weights."""
    gap = 0.5 * inputs
    after_w, after_b = inputs + gap, inputs + 2 * gap + rank
    figure = Figure(figsize=(7.2, 2.9))
    axes = figure.add_subplot(aspect="equal")
    names, widths, heights = ["W, frozen", "B", "A"], [inputs, rank, inputs], [outputs, outputs, rank]
    downward = [-height for height in heights]
    bars = axes.bar([0, after_w, after_b], downward, widths, align="edge", color=[MUTED, TRAIN, VALIDATION])
    words = [f"{name}\n{high:,} x {wide:,} = {high * wide:,}" for name, high, wide in zip(names, heights, widths)]
    axes.bar_label(bars, words, padding=4, fontsize=9)
    for sign, place in [("+ (alpha/r) ·", after_w - gap / 2), ("·", after_b - gap / 2)]:
        axes.text(place, -outputs / 2, sign, ha="center", va="center", fontsize=11)
    axes.margins(0)
    axes.axis("off")
    return figure


# ------------------------------------------------------------------------------------------- checks of the exercises


@exercise("a whole number of parameters", number)
def check_trainable(answer: float) -> str:
    """Is `answer` the number of trainable parameters of a LoRA adapter with rank 8 on q_proj and v_proj of Llama-3.1-8B?"""
    shape, r, layers = CATALOG["Llama-3.1-8B-Instruct"].shape, 8, ["q_proj", "v_proj"]
    wanted, deep = shape.lora_parameters(r, layers), shape.num_hidden_layers
    sizes = [shape.linear_layers()[layer] for layer in layers]
    slips = [
        (wanted // deep, "that is one transformer layer. How many does the model have?"),
        (shape.lora_parameters(r), "that is for all linear layers; only two of them are asked for here."),
        (deep * sum(i * o for i, o in sizes), "that is the size of the layers themselves. Which matrices learn?"),
        (deep * r * sum(i for i, _ in sizes), "A alone, without B."),
        (deep * r * sum(o for _, o in sizes), "B alone, without A."),
        (deep * r * sum(2 * i for i, _ in sizes), "v_proj is not square: look at its (in, out)."),
        (shape.lora_parameters(1, layers), "that would be rank 1."),
    ]
    otherwise = "each chosen layer of each transformer layer gets a pair of matrices. What sides do they have?"
    must_be(answer, wanted, slips, otherwise, within=0)
    share = wanted / shape.parameters()
    return f"Right. That is {share:.3%} of the model: two thin matrices for each chosen layer, and no other."


@exercise()
def check_lora_layer(answer: Callable[..., Any]) -> str:
    """Does `answer(x, weight, a, b, alpha, rank)` give what a LoRA layer gives?"""
    for given, (x, weight, a, b, alpha, rank) in lora_trials(answer, with_inputs=True):
        plain, learned, scale = x @ weight.T, x @ a.T @ b.T, alpha / rank
        slips = [
            (plain, "that is the frozen layer alone."),
            (scale * learned, "that is the adapter alone; the frozen layer's output belongs to it."),
            (plain + learned, "the scale is missing."),
            (plain + alpha * learned, "alpha is divided by something first."),
            (plain + alpha // rank * learned, "the scale is there, but it need not be a whole number."),
            (scale * (plain + learned), "the scale is for the adapter only, not for W."),
        ]
        otherwise = "the values are not right. Two outputs are added: of the frozen layer, and of the scaled pair."
        must_be(given, plain + scale * learned, slips, otherwise)
    return "Right, for three shapes. From left to right, x Aᵀ is short and x Aᵀ Bᵀ never makes the large matrix that B A would be."


@exercise()
def check_best_pair(answer: Callable[[torch.Tensor, int], Any], rank: int = 3) -> str:
    """Does `answer(change, rank)` give (b, a) of that rank whose product is as near to `change` as any can be?"""
    chance = torch.Generator().manual_seed(0)
    for outputs, inputs in [(12, 8), (6, 15)]:
        change = torch.randn((outputs, inputs), generator=chance)
        case = f"with a change of {outputs} x {inputs}, "
        b, a = attempt(answer, change.clone(), rank, kind=_two_matrices, where=case)
        if b.shape != (outputs, rank) or a.shape != (rank, inputs):
            found = f"yours are {tuple(b.shape)} and {tuple(a.shape)}"
            raise NotYet(f"{case}B is {outputs} x {rank} and A is {rank} x {inputs}; {found}.")
        u, sizes, v = torch.linalg.svd(change, full_matrices=False)
        missed, possible = (change - b @ a).norm() / sizes.norm(), sizes[rank:].norm() / sizes.norm()
        if not missed <= 1.001 * possible:
            slips = [
                (u[:, :rank] @ v[:rank], "The singular values are missing."),
                (u[:, :rank] * sizes[:rank] ** 2 @ v[:rank], "The singular values are in it twice."),
                (u[:, -rank:] * sizes[-rank:] @ v[-rank:], "Those are the smallest parts. Keep the largest."),
            ]
            off = f"your product misses {missed:.0%} of the change, and {possible:.0%} is possible."
            slips = [(product, f"{off} {hint}") for product, hint in slips]
            must_be(b @ a, change, slips, f"{off} torch.linalg.svd writes a matrix as a sum of parts, largest first.")
    return "Right: no pair of this rank is nearer. Training finds its pair by small steps instead, without ever seeing the change it looks for."


def _two_matrices(given: Any) -> tuple[torch.Tensor, torch.Tensor]:
    b, a = (torch.as_tensor(matrix, dtype=torch.float32, device="cpu") for matrix in given)
    return b, a

"""Lesson 04: what checkpointing saves at which length, how the learning rate moves, and the checks of the exercises.

saving_chart({"SmolLM2-135M": {128: 0.2, 512: 0.5}}, quoted=0.6)
schedule_chart({"cosine": [0.0, 1e-4, 2e-4, 1e-4, 0.0]}, warmup_steps=2)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from matplotlib.figure import Figure
from torch.nn.utils import parameters_to_vector

from helpers.memory import estimate
from helpers.plots import MARKERS, MUTED, VALIDATION
from helpers.registry import ModelShape
from notebooks.lessons.scaffold import NotYet, alike, attempt, chart, exercise, level, must_be, number, pair


def saved_by_checkpointing(shape: ModelShape, tokens: int) -> float:
    """Share of the peak memory that checkpointing saves, by the kit's formula; `tokens` in one micro-batch of one example."""
    off, on = (estimate(shape, 1, tokens, checkpointing=mode).total_bytes for mode in ("off", "on"))
    return 1 - on / off


@chart
def saving_chart(shares: Mapping[str, Mapping[int, float]], quoted: float) -> Figure:
    """Share of the peak memory that gradient checkpointing saves, with the share that articles promise (0 to 1).

    `shares` is model -> (tokens per micro-batch, rising -> share of the peak saved, 0 to 1).
    """
    figure = Figure(figsize=(7.2, 3.6))
    axes = figure.add_subplot(ylabel="% of the peak memory saved", ylim=(0, 100))
    axes.set_xlabel("tokens that go through the model at once (micro-batch x length)")
    for (model, points), marker in zip(shares.items(), MARKERS):
        axes.plot(list(points), [100 * share for share in points.values()], marker=marker, label=model)
    level(axes, 100 * quoted, f" quoted: {quoted:.0%}", VALIDATION, ha="left")
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(points), [f"{count:,}" for count in points])
    axes.legend()
    return figure


@chart
def schedule_chart(rates: Mapping[str, Sequence[float]], warmup_steps: int) -> Figure:
    """Learning rate by optimizer step (schedule -> the rate used at step 1, 2, ...), with the warmup shaded."""
    figure = Figure(figsize=(7.2, 3.2))
    axes = figure.add_subplot(xlabel="optimizer step", ylabel="learning rate")
    if warmup_steps:
        axes.axvspan(1, warmup_steps + 1, color=MUTED, alpha=0.18, linewidth=0)
        axes.text(1, 0.03, " warmup", transform=axes.get_xaxis_transform(), color=MUTED, fontsize=8.5)
    for (name, values), marker in zip(rates.items(), MARKERS):
        axes.plot(range(1, len(values) + 1), values, marker=marker, markersize=4, label=name)
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    axes.legend(loc="lower left", bbox_to_anchor=(0.16, 0.0))
    return figure


# ------------------------------------------------------------------------------------------- checks of the exercises


@exercise("a pair of numbers, (accumulation, steps)", pair)
def check_steps(answer: tuple[float, float], examples: int, effective_batch: int, micro_batch: int) -> str:
    """Easy. `answer`: (accumulation, optimizer steps of one epoch)."""
    accumulation, steps = answer
    if accumulation * micro_batch != effective_batch:
        seen = f"{accumulation * micro_batch:g} examples"
        raise NotYet(f"with this accumulation, a step would see {seen}. How many should it see?")
    if steps == -(-examples // effective_batch):
        return "Right: the micro-batch decides the memory, the effective batch the steps, accumulation makes up the difference."
    if abs(steps - examples / effective_batch) < 1:
        raise NotYet("accumulation is right. May the last step of an epoch see fewer examples than the others?")
    raise NotYet("accumulation is right. A step is one update, and an epoch shows each example once.")


@exercise("one of the lengths", number)
def check_length(answer: float, shape: ModelShape, lengths: Iterable[int], share: float = 0.6) -> str:
    """Medium. `answer`: the shortest of `lengths` at which checkpointing saves at least `share` of the peak."""
    saved = {length: saved_by_checkpointing(shape, length) for length in sorted(lengths)}
    if answer not in saved:
        raise NotYet(f"the answer is one of the lengths, {', '.join(map(str, saved))}.")
    if saved[answer] < share:
        raise NotYet(f"at {answer} tokens it saves {saved[answer]:.0%} of the peak, which is too little.")
    if any(saved[length] >= share for length in saved if length < answer):
        raise NotYet(f"at {answer} tokens it does save {share:.0%}, but a shorter length is enough.")
    return f"Right: below {answer} tokens the weights fill most of the peak, and those checkpointing cannot shrink."


@exercise()
def check_accumulate(accumulate: Callable[[torch.nn.Module, list[tuple[torch.Tensor, torch.Tensor]]], Any]) -> str:
    """Hard. `accumulate(model, micro_batches)` must leave the gradient of the mean squared error over all rows in `model`."""
    chance, rows = torch.Generator().manual_seed(4), (1, 5, 2)
    batches = [(torch.randn(count, 3, generator=chance), torch.randn(count, generator=chance)) for count in rows]
    model = torch.nn.Linear(3, 1)
    sums = torch.stack([_summed_gradient(model, *batch) for batch in batches])
    of_means = (sums / torch.tensor(rows)[:, None]).sum(0)
    before, found, seen = parameters_to_vector(model.parameters()), [], []
    model.register_forward_hook(lambda module, inputs, outputs: seen.append(len(outputs)))
    for _ in range(2):
        attempt(accumulate, model, list(batches), kind=lambda nothing: nothing)
        if any(weight.grad is None for weight in model.parameters()):
            raise NotYet("your function left no gradient in the model.")
        found.append(parameters_to_vector(weight.grad for weight in model.parameters()))
    if not torch.equal(before, parameters_to_vector(model.parameters())):
        raise NotYet("the weights changed. Only leave the gradients; the optimizer's step comes later.")
    if max(seen, default=0) > max(rows):
        raise NotYet(f"{max(seen)} rows went through the model at once, and no micro-batch has more than {max(rows)}.")
    uneven = "a row of a small micro-batch counts for more. Which count should all be divided by?"
    slips = [
        (of_means / len(rows), uneven),
        (of_means, uneven),
        (
            sums.sum(0),
            "this is the gradient of the sum; the direction is right, its size grows with the number of rows.",
        ),
    ]
    otherwise = "the gradient is another one than that of the mean squared error over all rows at once."
    must_be(found[0], sums.sum(0) / sum(rows), slips, otherwise)
    if not alike(found[1], found[0]):
        raise NotYet("right the first time, but a second call adds to the gradients that the first one left.")
    return "Right: divided by the rows of the whole step, micro-batches of any size give one large batch's gradient."


def _summed_gradient(model: torch.nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Gradient of a micro-batch's squared errors, added up. In fp32 on the CPU."""
    loss = ((model(inputs).squeeze(-1) - targets) ** 2).sum()
    return parameters_to_vector(torch.autograd.grad(loss, list(model.parameters())))

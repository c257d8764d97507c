"""Lesson 04: what checkpointing saves at which length, how the learning rate moves, and the checks of the exercises.

saving_chart({"SmolLM2-135M": {128: 0.2, 512: 0.5}}, quoted=0.6)
schedule_chart({"cosine": [0.0, 1e-4, 2e-4, 1e-4, 0.0]}, warmup_steps=2)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from matplotlib.figure import Figure

from helpers.memory import estimate
from helpers.plots import MARKERS, MUTED, VALIDATION
from notebooks.lessons.scaffold import NotYet, attempt, bare_axes, exercise, function, note, number

if TYPE_CHECKING:
    from helpers.registry import ModelShape

MicroBatches = list[tuple[torch.Tensor, torch.Tensor]]


# ------------------------------------------------------------------------------------------- charts


def saved_by_checkpointing(shape: ModelShape, tokens: int) -> float:
    """Share of the peak memory that checkpointing saves, by the kit's formula; `tokens` in one micro-batch of one example."""
    off, on = (estimate(shape, 1, tokens, checkpointing=mode).total_bytes for mode in ("off", "on"))
    return 1 - on / off


def saving_chart(shares: Mapping[str, Mapping[int, float]], quoted: float) -> Figure:
    """Share of the peak memory that gradient checkpointing saves, by tokens per micro-batch, with the number that people quote.

    Args:
        shares: model -> (tokens per micro-batch -> share of the peak saved, 0 to 1).
        quoted: the share that articles promise, 0 to 1.
    """
    figure, axes = bare_axes(7.2, 3.6)
    for (model, points), marker in zip(shares.items(), MARKERS):
        tokens = sorted(points)
        axes.plot(tokens, [100 * points[count] for count in tokens], marker=marker, linewidth=1.8, label=model)
    axes.axhline(100 * quoted, color=VALIDATION, linestyle="--", linewidth=1.4)
    looks = {"xycoords": ("axes fraction", "data"), "color": VALIDATION, "fontsize": 9, "fontweight": "bold"}
    note(axes, f"quoted: {quoted:.0%}", (0, 100 * quoted), (4, 4), **looks)
    axes.set_xscale("log", base=2)
    ticks = sorted({count for points in shares.values() for count in points})
    axes.set_xticks(ticks, [f"{count:,}" for count in ticks])
    axes.set_ylim(0, 100)
    axes.set_xlabel("tokens that go through the model at once (micro-batch x length)")
    axes.set_ylabel("% of the peak memory saved")
    axes.legend(frameon=False)
    return figure


def schedule_chart(rates: Mapping[str, Sequence[float]], warmup_steps: int) -> Figure:
    """Learning rate by optimizer step, one line per schedule, with the warmup shaded.

    Args:
        rates: schedule -> the rate used at step 1, 2, ...
    """
    figure, axes = bare_axes(7.2, 3.2)
    if warmup_steps:
        axes.axvspan(1, warmup_steps + 1, color=MUTED, alpha=0.18, linewidth=0)
        note(axes, "warmup", (1.0, 0.02), (4, 2), xycoords=("data", "axes fraction"), color=MUTED)
    for (name, values), marker in zip(rates.items(), MARKERS):
        axes.plot(range(1, len(values) + 1), values, marker=marker, markersize=4, linewidth=1.6, label=name)
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    axes.set(xlabel="optimizer step", ylabel="learning rate")
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0.16, 0.0))
    return figure


# ------------------------------------------------------------------------------------------- checks of the exercises


@exercise("a pair of numbers, (accumulation, steps)")
def check_steps(answer: Any, examples: int, effective_batch: int, micro_batch: int) -> str:
    """Easy. `answer`: (accumulation, optimizer steps of one epoch)."""
    try:
        accumulation, steps = (float(number) for number in answer)
    except (TypeError, ValueError):
        raise NotYet("the answer is a pair of numbers, (accumulation, steps).") from None
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
    lengths = sorted(lengths)
    if answer not in lengths:
        raise NotYet(f"the answer is one of the lengths, {', '.join(map(str, lengths))}.")
    saved = saved_by_checkpointing(shape, int(answer))
    if saved < share:
        raise NotYet(f"at {answer} tokens it saves {saved:.0%} of the peak, which is too little.")
    if any(saved_by_checkpointing(shape, length) >= share for length in lengths if length < answer):
        raise NotYet(f"at {answer} tokens it does save {share:.0%}, but a shorter length is enough.")
    return f"Right: below {answer} tokens the weights fill most of the peak, and those checkpointing cannot shrink."


@exercise("the function itself, without brackets", function)
def check_accumulate(accumulate: Callable[[Any, MicroBatches], Any]) -> str:
    """Hard. `accumulate(model, micro_batches)` must leave the gradient of the mean squared error over all rows in `model`."""
    chance, rows = torch.Generator().manual_seed(4), (1, 5, 2)
    batches = [(torch.randn(count, 3, generator=chance), torch.randn(count, generator=chance)) for count in rows]
    model = torch.nn.Linear(3, 1)
    wanted = _weighted_gradient(model, batches, [1 / sum(rows)] * 3)
    summed = _weighted_gradient(model, batches, [1.0] * 3)
    means_summed = _weighted_gradient(model, batches, [1 / count for count in rows])
    before = _flat(model.parameters())

    def twice() -> tuple[torch.Tensor, torch.Tensor]:
        model.zero_grad()
        accumulate(model, batches)
        first = _gradient(model)
        accumulate(model, batches)
        return first, _gradient(model)

    first, second = attempt(twice)
    if not _same(before, _flat(model.parameters())):
        raise NotYet("the weights changed. Only leave the gradients; the optimizer's step comes later.")
    if _same(first, means_summed / 3) or _same(first, means_summed):
        raise NotYet("a row of a small micro-batch counts for more. Which count should all be divided by?")
    if _same(first, summed):
        raise NotYet("this is the gradient of the sum; the direction is right, its size grows with the number of rows.")
    if not _same(first, wanted):
        raise NotYet("the gradient is another one than that of the mean squared error over all rows at once.")
    if not _same(second, wanted):
        raise NotYet("right the first time, but a second call adds to the gradients that the first one left.")
    return "Right: divided by the rows of the whole step, micro-batches of any size give one large batch's gradient."


def _weighted_gradient(model: torch.nn.Module, batches: MicroBatches, weights: Sequence[float]) -> torch.Tensor:
    """Gradient of the squared errors of each micro-batch times its weight, added up. In fp32 on the CPU."""
    losses = (((model(inputs).squeeze(-1) - targets) ** 2).sum() for inputs, targets in batches)
    total = torch.stack([weight * loss for weight, loss in zip(weights, losses)]).sum()
    return _flat(torch.autograd.grad(total, list(model.parameters())))


def _gradient(model: torch.nn.Module) -> torch.Tensor:
    gradients = [parameter.grad for parameter in model.parameters()]
    if any(gradient is None for gradient in gradients):
        raise NotYet("your function left no gradient in the model.")
    return _flat(gradients)


def _flat(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors]).cpu().clone()


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-3, atol=1e-5)

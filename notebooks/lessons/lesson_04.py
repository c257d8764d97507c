"""Charts of lesson 04: what checkpointing saves at which length, and how the learning rate moves.

saving_chart({"SmolLM2-135M": {128: 0.2, 512: 0.5}}, quoted=0.6)
schedule_chart({"cosine": [0.0, 1e-4, 2e-4, 1e-4, 0.0]}, warmup_steps=2)

Checks of lesson 04's exercises. Each prints one line: Right, Not yet, or Your turn; none raises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

from helpers.plots import MUTED, VALIDATION

if TYPE_CHECKING:
    import torch

    from helpers.registry import ModelShape


MARKERS = "osD^vPX*<>"  # color alone would be lost in print


def saving_chart(shares: Mapping[str, Mapping[int, float]], quoted: float) -> Figure:
    """Share of the peak memory that gradient checkpointing saves, by tokens per micro-batch, with the number that people quote.

    Args:
        shares: model -> (tokens per micro-batch -> share of the peak saved, 0 to 1).
        quoted: the share that articles promise, 0 to 1.
    """
    figure = Figure(figsize=(7.2, 3.6), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    for number, (model, points) in enumerate(shares.items()):
        tokens = sorted(points)
        axes.plot(
            tokens,
            [100 * points[count] for count in tokens],
            marker=MARKERS[number % len(MARKERS)],
            linewidth=1.8,
            label=model,
        )
    axes.axhline(100 * quoted, color=VALIDATION, linestyle="--", linewidth=1.4)
    axes.annotate(
        f"quoted: {quoted:.0%}",
        (0, 100 * quoted),
        xycoords=("axes fraction", "data"),
        xytext=(4, 4),
        textcoords="offset points",
        color=VALIDATION,
        fontsize=9,
        fontweight="bold",
    )
    axes.set_xscale("log", base=2)
    ticks = sorted({count for points in shares.values() for count in points})
    axes.set_xticks(ticks, [f"{count:,}" for count in ticks])
    axes.set_ylim(0, 100)
    axes.set_xlabel("tokens that go through the model at once (micro-batch x length)")
    axes.set_ylabel("% of the peak memory saved")
    _plain(axes)
    axes.legend(frameon=False)
    return figure


def schedule_chart(rates: Mapping[str, Sequence[float]], warmup_steps: int) -> Figure:
    """Learning rate by optimizer step, one line per schedule, with the warmup shaded.

    Args:
        rates: schedule -> the rate used at step 1, 2, ...
    """
    figure = Figure(figsize=(7.2, 3.2), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    if warmup_steps:
        axes.axvspan(1, warmup_steps + 1, color=MUTED, alpha=0.18, linewidth=0)
        axes.annotate(
            "warmup",
            (1.0, 0.02),
            xycoords=("data", "axes fraction"),
            xytext=(4, 2),
            textcoords="offset points",
            fontsize=8.5,
            color=MUTED,
        )
    for number, (name, values) in enumerate(rates.items()):
        axes.plot(
            range(1, len(values) + 1),
            values,
            marker=MARKERS[number % len(MARKERS)],
            markersize=4,
            linewidth=1.6,
            label=name,
        )
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("learning rate")
    _plain(axes)
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0.16, 0.0))
    return figure


def _plain(axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)


def check_steps(answer: Any, examples: int, effective_batch: int, micro_batch: int) -> None:
    """Easy. `answer`: (accumulation, optimizer steps of one epoch)."""
    if answer is None:
        print("Your turn: give two numbers, (accumulation, steps).")
        return
    try:
        accumulation, steps = (float(number) for number in answer)
    except (TypeError, ValueError):
        print("Not yet: the answer is a pair of numbers, (accumulation, steps).")
        return
    if accumulation * micro_batch != effective_batch:
        print(
            f"Not yet: with this accumulation, a step would see {accumulation * micro_batch:g} examples. How many should it see?"
        )
    elif steps == -(-examples // effective_batch):
        print(
            "Right: the micro-batch decides the memory, the effective batch decides the steps, accumulation makes up the difference."
        )
    elif abs(steps - examples / effective_batch) < 1:
        print(
            "Not yet: accumulation is right. Now the last step of an epoch: may it see fewer examples than the others?"
        )
    else:
        print(
            "Not yet: accumulation is right. A step is one update, not one micro-batch, and an epoch shows each example once."
        )


def saved_by_checkpointing(shape: ModelShape, tokens: int) -> float:
    """Share of the peak memory that checkpointing saves, by the kit's formula; `tokens` in one micro-batch of one example."""
    from helpers.memory import estimate

    off, on = (estimate(shape, 1, tokens, checkpointing=mode).total_bytes for mode in ("off", "on"))
    return 1 - on / off


def check_length(answer: Any, shape: ModelShape, lengths: Iterable[int], share: float = 0.6) -> None:
    """Medium. `answer`: the shortest of `lengths` at which checkpointing saves at least `share` of the peak."""
    if answer is None:
        print("Your turn: one of the lengths.")
        return
    lengths = sorted(lengths)
    if isinstance(answer, bool) or not isinstance(answer, (int, float)) or answer not in lengths:
        print(f"Not yet: the answer is one of the lengths, {', '.join(map(str, lengths))}.")
        return
    enough = [length for length in lengths if saved_by_checkpointing(shape, length) >= share]
    if answer not in enough:
        print(
            f"Not yet: at {answer} tokens it saves {saved_by_checkpointing(shape, int(answer)):.0%} of the peak, which is too little."
        )
    elif answer != enough[0]:
        print(f"Not yet: at {answer} tokens it does save {share:.0%}, but a shorter length is enough.")
    else:
        print(
            f"Right: below {answer} tokens the weights fill most of the peak, and checkpointing does not make them smaller."
        )


def check_accumulate(accumulate: Callable[[Any, list[tuple[torch.Tensor, torch.Tensor]]], Any] | None) -> None:
    """Hard. `accumulate(model, micro_batches)` must leave the gradient of the mean squared error over all rows in `model`."""
    if accumulate is None:
        print("Your turn: write the function, then name it here.")
        return
    if not callable(accumulate):
        print("Not yet: give the function itself, without brackets after its name.")
        return
    import torch

    numbers = torch.Generator().manual_seed(4)
    micro_batches = [
        (torch.randn(rows, 3, generator=numbers), torch.randn(rows, generator=numbers)) for rows in (1, 5, 2)
    ]
    model = torch.nn.Linear(3, 1)

    def gradient() -> torch.Tensor:
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).cpu()

    def of(weights: list[float]) -> torch.Tensor:
        model.zero_grad()
        for weight, (inputs, targets) in zip(weights, micro_batches):
            (weight * ((model(inputs).squeeze(-1) - targets) ** 2).sum()).backward()
        return gradient()

    rows = [len(targets) for _, targets in micro_batches]
    wanted, summed = of([1 / sum(rows)] * 3), of([1.0] * 3)
    means_summed = of([1 / count for count in rows])
    mean_of_means = means_summed / 3
    before = torch.cat([parameter.detach().flatten() for parameter in model.parameters()]).clone()
    try:  # what a learner writes may do anything
        model.zero_grad()
        accumulate(model, micro_batches)
        first = gradient()
        accumulate(model, micro_batches)
        second = gradient()
        after = torch.cat([parameter.detach().flatten() for parameter in model.parameters()]).cpu()
    except Exception as error:
        said = str(error).partition("\n")[0]
        print(f"Not yet: your function stopped, or left no gradient ({type(error).__name__}: {said:.90}).")
        return

    def same(one: torch.Tensor, other: torch.Tensor) -> bool:
        return one.shape == other.shape and torch.allclose(one, other, rtol=1e-3, atol=1e-5)

    if not same(before, after):
        print("Not yet: the weights changed. Only leave the gradients; the optimizer's step comes later.")
    elif same(first, mean_of_means) or same(first, means_summed):
        print(
            "Not yet: a row of a small micro-batch counts more than one of a large micro-batch. Which count should all be divided by?"
        )
    elif same(first, summed):
        print(
            "Not yet: this is the gradient of the sum; the direction is right, its size grows with the number of rows."
        )
    elif not same(first, wanted):
        print("Not yet: the gradient is another one than that of the mean squared error over all rows at once.")
    elif not same(second, wanted):
        print("Not yet: right the first time, but a second call adds to the gradients that the first one left.")
    else:
        print(
            "Right: divided by the rows of the whole step, micro-batches of any size give the gradient of one large batch."
        )

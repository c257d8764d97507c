"""Every figure, as a function that returns a matplotlib `Figure` (never a window, never pyplot's global state).

loss_chart(run.history).savefig("loss.png")

A matplotlib `Figure` as something that every notebook shows.

picture(loss_chart(run.history), "The loss falls")      # last line of a cell
place = Place()
place.show(figure, "Two runs")                          # again and again: the newest picture stands where the first one stood
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from functools import partial
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from helpers.memory import GIB, MemoryEstimate

if TYPE_CHECKING:
    from IPython.display import Image
    from matplotlib.figure import Figure


TRAIN, VALIDATION, BEST, MUTED = (
    "#4c78a8",
    "#e45756",
    "#2f7d4f",
    "#7a7a7a",
)  # told apart in color blindness and in grey
BINS = 40  # of the length histogram
VERDICT_WIDTH = 92  # characters of a line above the chart


def loss_chart(history: list[dict[str, Any]], total_steps: int | None = None, title: str = "") -> Figure:
    """Training and validation loss over optimizer steps, with the step of the lowest validation loss marked.

    Args:
        history: log events with the keys that TRL writes (`step`, `loss`, `eval_loss`).
        total_steps: length of the whole run, so that the axis does not move while it trains.
    """
    figure = Figure(figsize=(7.2, 3.8), dpi=110, layout="constrained")
    _draw_losses(figure.add_subplot(), history, total_steps, title)
    return figure


def training_chart(
    history: list[dict[str, Any]],
    total_steps: int | None = None,
    title: str = "",
    verdict: str = "",
    planned_bytes: int | None = None,
) -> Figure:
    """The loss chart with what else is worth watching below it: learning rate, gradient norm, memory against the plan.

    Args:
        history: log events; the strips read `learning_rate`, `grad_norm` and `peak_bytes`.
        verdict: one sentence on what the curve says, shown above it.
        planned_bytes: what the plan said the peak would be.
    """
    figure = Figure(figsize=(7.2, 5.2), dpi=110, layout="constrained")
    rows = figure.add_gridspec(2, 3, height_ratios=[3.6, 1])
    losses = figure.add_subplot(rows[0, :])
    _draw_losses(losses, history, total_steps, title)
    losses.set_xlabel("")
    if verdict:
        sentence = fill(verdict, VERDICT_WIDTH)
        losses.text(0, 1.01, sentence, transform=losses.transAxes, va="bottom", fontsize=9.5, fontweight="bold")
        losses.set_title(title, loc="left", fontsize=10, color=MUTED, pad=20 + 12 * sentence.count("\n"))
    limits = _step_limits(history, total_steps)
    for column, (key, label) in enumerate([("learning_rate", "learning rate"), ("grad_norm", "gradient norm")]):
        axes = figure.add_subplot(rows[1, column])
        axes.plot(*_points(history, key), color=TRAIN, linewidth=1.4, marker=".", markersize=3)
        axes.set_xlim(*limits)
        axes.set_ylim(bottom=0)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
        _strip(axes, f"{label} by step")
    memory = figure.add_subplot(rows[1, 2])
    used = max((event.get("peak_bytes") or 0 for event in history), default=0) / GIB
    names, sizes = ["used"], [used]
    if planned_bytes:
        names, sizes = ["used", "planned"], [used, planned_bytes / GIB]
    bars = memory.barh(names, sizes, color=[TRAIN, MUTED][: len(names)], height=0.6)
    memory.bar_label(bars, fmt="%.1f GiB", padding=3, fontsize=8)
    memory.set_xlim(0, max(*sizes, 0.1) * 1.5)
    memory.set_xticks([])
    memory.invert_yaxis()
    _strip(memory, "memory at the peak")
    return figure


def comparison_chart(histories: dict[str, list[dict[str, Any]]]) -> Figure:
    """Validation curves of several runs on one pair of axes, each with its best step marked.

    Args:
        histories: label -> log events.
    """
    figure = Figure(figsize=(7.2, 3.8), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    for number, (label, history) in enumerate(histories.items()):
        steps, losses = _points(history, "eval_loss")
        color, marker = f"C{number % 10}", "osD^vPX*<>"[number % 10]  # color alone would be lost in print
        axes.plot(steps, losses, color=color, linewidth=1.8, marker=marker, markersize=5, label=label)
        trained = [point for point in zip(steps, losses) if point[0] > 0]
        if trained:
            axes.scatter(
                *min(trained, key=lambda point: point[1]), s=170, facecolors="none", edgecolors=color, linewidths=1.8
            )
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("validation loss per answer token")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    if histories:
        axes.legend(frameon=False, title="circle: best step", title_fontsize=8.5)
    return figure


def length_chart(
    token_lengths: Sequence[int], max_length: int, memory: dict[int, float] | None = None, title: str = ""
) -> Figure:
    """Histogram of tokens per example with a line at `max_length`, and what share of the examples it covers whole.

    Args:
        token_lengths: tokens of each example, as `helpers.data.lengths` gives them.
        memory: sequence length -> GiB of a training step; drawn as a second panel below.
    """
    from helpers.data.tokens import coverage  # here, because whoever has lengths has loaded the data rooms already

    figure = Figure(figsize=(7.2, 3.4 if memory is None else 5.4), dpi=110, layout="constrained")
    panels = figure.subplots(
        1 if memory is None else 2, 1, squeeze=False, height_ratios=None if memory is None else (3, 2)
    )
    axes = panels[0][0]
    right = max([max_length, *token_lengths]) * 1.05
    axes.hist(token_lengths, bins=BINS, range=(0, right), color=TRAIN, edgecolor="white", linewidth=0.4)
    axes.axvline(max_length, color=VALIDATION, linewidth=1.6, linestyle="--")
    axes.annotate(
        f"max_length {max_length:,} covers {_percent(coverage(token_lengths, max_length))} of your examples",
        (max_length, 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(0, 4),
        textcoords="offset points",
        ha="right" if max_length > 0.5 * right else "left",
        fontsize=9,
        color=VALIDATION,
        fontweight="bold",
    )
    axes.set_xlabel("tokens per example, question and answer together")
    axes.set_ylabel("examples")
    axes.set_title(title, loc="left", fontsize=10.5, pad=18)
    if memory is not None:
        _memory_panel(panels[1][0], partial(coverage, token_lengths), max_length, memory)
    for panel in panels[:, 0]:
        panel.spines[["top", "right"]].set_visible(False)
    return figure


def _memory_panel(axes: Axes, coverage: Callable[[int], float], max_length: int, memory: dict[int, float]) -> None:
    """One bar per sequence length, labeled with what it costs and what it covers."""
    chosen = sorted(memory)
    bars = axes.barh(
        range(len(chosen)),
        [memory[length] for length in chosen],
        height=0.66,
        color=[VALIDATION if length == max_length else MUTED for length in chosen],
    )
    covered = [_percent(coverage(length)) for length in chosen]
    axes.bar_label(
        bars,
        [f"{memory[length]:.1f} GiB, covers {share}" for length, share in zip(chosen, covered)],
        padding=4,
        fontsize=8.5,
    )
    axes.set_yticks(range(len(chosen)), [f"{length:,}" for length in chosen])
    axes.invert_yaxis()
    axes.set_xlim(0, max(memory.values()) * 1.35)
    axes.set_ylabel("max_length")
    axes.set_xlabel("GiB at the peak of a training step, if every example were that long")


def _percent(share: float) -> str:
    """Rounded down, so that "100 %" means every one."""
    return f"{int(share * 1000) / 10:g} %"


def _points(history: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """(steps, values) of the events that have a number under `key`."""
    found = [(event["step"], event[key]) for event in history if event.get(key) is not None]
    return [step for step, _ in found], [value for _, value in found]


def _step_limits(history: list[dict[str, Any]], total_steps: int | None) -> tuple[float, float]:
    return -0.4, (total_steps or max([1, *[event["step"] for event in history]])) + 0.4


def _strip(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=8.5, color=MUTED, pad=12)
    axes.tick_params(labelsize=7.5)
    axes.yaxis.get_offset_text().set_fontsize(7)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_losses(axes: Axes, history: list[dict[str, Any]], total_steps: int | None, title: str) -> None:
    train, validation = list(zip(*_points(history, "loss"))), list(zip(*_points(history, "eval_loss")))
    if train:
        axes.plot(*zip(*train), color=TRAIN, linewidth=1.8, marker=".", markersize=5, label="training loss")
    if validation:
        axes.plot(*zip(*validation), color=VALIDATION, linewidth=1.8, marker="o", markersize=5, label="validation loss")
        axes.annotate(
            f"untrained model: {validation[0][1]:.2f}",
            (1, validation[0][1]),
            xycoords=("axes fraction", "data"),
            xytext=(-4, 4),
            textcoords="offset points",
            ha="right",
            fontsize=8.5,
            color=MUTED,
        )
        axes.axhline(validation[0][1], color=MUTED, linewidth=0.8, linestyle=":", zorder=0)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss per answer token")
    axes.set_title(title, loc="left", fontsize=10.5)
    axes.set_xlim(*_step_limits(history, total_steps))
    axes.margins(y=0.14)
    trained = [point for point in validation if point[0] > 0]
    if trained:
        _mark_best(axes, min(trained, key=lambda point: point[1]), [train, validation])
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    if train or validation:
        axes.legend(frameon=False, loc="lower left")


def _mark_best(axes: Axes, best: tuple[float, float], curves: list[list[tuple[float, float]]]) -> None:
    """A ring around the best point, and its name on that side of it where it hides the least of the curves."""
    axes.scatter(*zip(best), s=190, facecolors="none", edgecolors=BEST, linewidths=2, zorder=3, clip_on=False)
    label = axes.annotate(
        f"best: {best[1]:.2f} at step {best[0]:g}",
        best,
        xytext=(0, 0),
        textcoords="offset points",
        va="center",
        color=BEST,
        fontweight="bold",
        annotation_clip=False,
    )
    drawn = []  # every pixel or so of the curves
    for curve in filter(None, curves):
        steps = np.linspace(curve[0][0], curve[-1][0], 400)
        drawn.append(axes.transData.transform(np.column_stack([steps, np.interp(steps, *zip(*curve))])))
    pixels = np.concatenate(drawn)

    def hidden(side: tuple[str, int, int]) -> float:
        label.set_ha(side[0])
        label.set_position(side[1:])
        box = label.get_window_extent()
        outside = not (axes.bbox.contains(box.x0, box.y0) and axes.bbox.contains(box.x1, box.y1))
        inside = (pixels > (box.x0, box.y0)) & (pixels < (box.x1, box.y1))
        return outside * len(pixels) + inside.all(axis=1).sum()

    sides = [("right", 0, -20), ("left", 0, 20), ("right", 0, 20), ("left", 0, -20), ("left", 12, 0), ("right", -12, 0)]
    hidden(min(sides, key=hidden))  # the last call leaves it there


# One color per part, from what stays (cool) to what comes and goes (warm); parts not named here share the last one.
PART_COLORS = {
    "base weights": "#3b5b92",
    "embeddings and norms": "#7195c9",
    "adapters (fp32)": "#4f9d8f",
    "optimizer": "#8cc5b5",
    "gradients": "#c2dfb8",
    "CUDA and libraries": "#b5b5b5",
    "NCCL": "#d0d0d0",
    "gradients on their way": "#a3cf9a",
    "layers gathered for use": "#5b7fb8",
    "saved activations": "#f2b84b",
    "one layer, recomputed": "#e8853d",
    "backward pass": "#e8853d",
    "unpacked weights": "#c95d63",
    "loss head": "#8e4a7e",
}


def memory_chart(
    estimates: dict[str, MemoryEstimate], card_bytes: int | None = None, card_name: str = "this card"
) -> Figure:
    """One stacked bar per estimate, its parts told apart by color, against the line of what the card can give.

    Args:
        estimates: label -> estimate; one entry for a single bar, several to compare.
        card_bytes: where to draw the card's line; bars that cross it get their total in red.
    """
    names = list(dict.fromkeys(part for estimate in estimates.values() for part in estimate.parts))
    names.sort(key=lambda part: list(PART_COLORS).index(part) if part in PART_COLORS else len(PART_COLORS))
    figure = Figure(
        figsize=(8.4, 1.5 + 0.42 * len(estimates) + 0.22 * -(-len(names) // 4)), dpi=110, layout="constrained"
    )
    axes = figure.add_subplot()
    longest = max([card_bytes or 0, *(estimate.total_bytes for estimate in estimates.values())]) / GIB
    for row, estimate in enumerate(estimates.values()):
        left = 0.0
        for part in names:
            width = estimate.parts.get(part, 0) / GIB
            label = part if part not in axes.get_legend_handles_labels()[1] else None
            axes.barh(
                row,
                width,
                left=left,
                height=0.66,
                color=PART_COLORS.get(part, MUTED),
                edgecolor="white",
                linewidth=0.6,
                label=label,
            )
            left += width
        too_much = card_bytes is not None and estimate.total_bytes > card_bytes
        axes.text(
            left + longest * 0.012,
            row,
            f"{left:.1f}",
            va="center",
            color=VALIDATION if too_much else "black",
            fontweight="bold",
        )
    if card_bytes is not None:
        axes.axvline(card_bytes / GIB, color="black", linewidth=1.4, linestyle="--")
        axes.annotate(
            f"{card_name}: {card_bytes / GIB:.1f}",
            (card_bytes / GIB, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(-4, 4),
            textcoords="offset points",
            ha="right",
            fontsize=8.5,
        )
    axes.set_yticks(range(len(estimates)), list(estimates))
    axes.invert_yaxis()
    axes.set_xlim(0, longest * 1.1)
    axes.set_xlabel("GiB at the peak of a training step")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8.5)
    return figure


def picture(figure: Figure, words: str = "") -> Image:
    """`figure` as a PNG. The kit's figures are made without pyplot, so a notebook does not show them by itself.

    Args:
        words: what is to be seen, for readers who cannot see it.
    """
    from IPython.display import Image

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image(
        buffer.getvalue(), format="png", embed=True, metadata={"alt": words}
    )  # alt= is unknown to Colab's IPython 7


class Place:
    """One place below a cell, whose picture is replaced without flicker: a display handle."""

    def __init__(self) -> None:
        self._handle: Any = None

    def show(self, figure: Figure, words: str = "") -> None:
        """`words`: what is to be seen, for readers who cannot see it."""
        from IPython.display import display

        image = picture(figure, words)
        if self._handle is None:
            self._handle = display(image, display_id=True)
        else:
            self._handle.update(image)

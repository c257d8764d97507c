"""Every figure, as a function that returns a matplotlib `Figure`: never a window, never pyplot's global state.

picture(loss_chart(run.history), "The loss falls")      # last line of a cell
place = Place()
place.show(figure, "Two runs")      # again and again: the newest picture stands where the first one stood
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from helpers.hardware import GIB
from helpers.memory import MemoryEstimate
from helpers.runs import History

if TYPE_CHECKING:
    from IPython.display import Image

# Told apart in color blindness and in grey.
TRAIN, VALIDATION, BEST, MUTED = "#4c78a8", "#e45756", "#2f7d4f", "#7a7a7a"
MARKERS = "osD^vPX*<>"  # of lines: color alone would be lost in print
BINS = 40  # of the length histogram
DIAGNOSIS_WIDTH = 92  # characters of a line above the chart
STRIPS = {"learning_rate": "learning rate by step", "grad_norm": "gradient norm by step", "memory": "peak memory"}
STYLE = {
    "figure.figsize": (7.2, 3.8),  # inches
    "figure.dpi": 110,
    "figure.constrained_layout.use": True,
    "text.parse_math": False,  # names of runs and files hold what they like, a dollar too
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.8,
}

# One color per part, from what stays (cool) to what comes and goes (warm); parts not named here share MUTED.
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


@rc_context(STYLE)
def loss_chart(history: History, max_steps: int | None = None, title: str = "") -> Figure:
    """Training and validation loss over optimizer steps, with the step of the lowest validation loss marked.

    Args:
        history: log events with the keys that TRL writes (`step`, `loss`, `eval_loss`).
        max_steps: length of the whole run, so that the axis does not move while it trains.
    """
    figure = Figure()
    _draw_losses(figure.add_subplot(title=title), history, max_steps)
    return figure


@rc_context(STYLE)
def training_chart(
    history: History, max_steps: int | None = None, title: str = "", diagnosis: str = "", planned_bytes: int = 0
) -> Figure:
    """The loss chart with what else is worth watching below it: learning rate, gradient norm, memory against the plan.

    Args:
        history: log events; the strips read `learning_rate`, `grad_norm` and `peak_bytes`.
        diagnosis: one sentence on what the curve says, shown above it.
        planned_bytes: what the plan said the peak would be; 0 if it did not.
    """
    figure = Figure(figsize=(7.2, 5.4))
    figure.suptitle(fill(diagnosis, DIAGNOSIS_WIDTH), x=0.01, ha="left", fontsize=9.5, fontweight="bold")
    panels: dict[str, Axes] = figure.subplot_mosaic([["loss"] * 3, list(STRIPS)], height_ratios=[3.6, 1])
    panels["loss"].set_title(title, color=MUTED)
    _draw_losses(panels["loss"], history, max_steps)
    for key, words in STRIPS.items():
        panels[key].set_title(words, fontsize=8.5, color=MUTED, pad=12)
        panels[key].tick_params(labelsize=7.5)
    for key in ("learning_rate", "grad_norm"):
        panels[key].plot(*_points(history, key), color=TRAIN, marker=".", markersize=3)
        panels[key].set(xlim=panels["loss"].get_xlim(), ylim=(0, None))
        panels[key].ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
        panels[key].yaxis.get_offset_text().set_fontsize(7)
    sizes = {"used": max((event.get("peak_bytes") or 0 for event in history), default=0) / GIB}
    if planned_bytes:
        sizes["planned"] = planned_bytes / GIB
    memory = panels["memory"]
    bars = memory.barh(list(sizes), list(sizes.values()), color=[TRAIN, MUTED][: len(sizes)], height=0.6)
    memory.bar_label(bars, fmt="%.1f GiB", padding=3, fontsize=8)
    memory.set(xlim=(0, max(*sizes.values(), 0.1) * 1.5), xticks=[])
    memory.invert_yaxis()
    return figure


@rc_context(STYLE)
def comparison_chart(histories: dict[str, History]) -> Figure:
    """Validation curves of several runs (label -> log events) on one pair of axes, each with its best step marked."""
    figure = Figure()
    axes = figure.add_subplot(xlabel="optimizer step", ylabel="validation loss per answer token")
    for number, (label, history) in enumerate(histories.items()):
        color, marker = f"C{number % 10}", MARKERS[number % 10]
        axes.plot(*_points(history, "eval_loss"), color=color, marker=marker, label=label)
        _ring_best(axes, history, color)
    axes.grid(axis="y", alpha=0.25)
    if histories:
        axes.legend(title="circle: best step", fontsize="medium")
    return figure


@rc_context(STYLE)
def length_chart(
    token_lengths: Sequence[int], max_length: int, memory: dict[int, float] | None = None, title: str = ""
) -> Figure:
    """Histogram of tokens per example with a line at `max_length`, and what share of the examples it covers whole.

    Args:
        token_lengths: tokens of each example, as `helpers.data.lengths` gives them.
        memory: sequence length -> GiB of a training step; drawn as a second panel below.
    """
    figure = Figure(figsize=(7.2, 5.4 if memory else 3.4))
    rows = figure.add_gridspec(2 if memory else 1, 1, height_ratios=[3, 2] if memory else None)
    axes = figure.add_subplot(rows[0], xlabel="tokens per example, question and answer together", ylabel="examples")
    axes.set_title(title, pad=18)
    right = max([max_length, *token_lengths]) * 1.05
    axes.hist(token_lengths, bins=BINS, range=(0, right), color=TRAIN, edgecolor="white", linewidth=0.4)
    covers = f"max_length {max_length:,} covers {_covered(token_lengths, max_length)} of your examples"
    side = "right" if max_length > right / 2 else "left"
    _mark_limit(axes, max_length, covers, ha=side, color=VALIDATION, fontweight="bold")
    if memory:
        costs = figure.add_subplot(rows[1], ylabel="max_length")
        colors = [VALIDATION if length == max_length else MUTED for length in sorted(memory)]
        bars = costs.barh([f"{n:,}" for n in sorted(memory)], [memory[n] for n in sorted(memory)], 0.66, color=colors)
        labels = [f"{memory[n]:.1f} GiB, covers {_covered(token_lengths, n)}" for n in sorted(memory)]
        costs.bar_label(bars, labels, padding=4, fontsize=8.5)
        costs.set_xlabel("GiB at the peak of a training step, if every example were that long")
        costs.set_xlim(0, max(memory.values()) * 1.35)
        costs.invert_yaxis()
    return figure


@rc_context(STYLE)
def memory_chart(
    estimates: dict[str, MemoryEstimate], card_bytes: int | None = None, card_name: str = "this card"
) -> Figure:
    """One stacked bar per estimate, its parts told apart by color, against the line of what the card can give.

    Args:
        estimates: label -> estimate; one entry for a single bar, several to compare.
        card_bytes: where to draw the card's line; bars that cross it get their total in red.
    """
    used = {part for estimate in estimates.values() for part in estimate.parts}
    parts = [part for part in PART_COLORS if part in used] + sorted(used - set(PART_COLORS))
    figure = Figure(figsize=(8.4, 1.5 + 0.42 * len(estimates) + 0.22 * math.ceil(len(parts) / 4)))  # legend: 4 columns
    axes = figure.add_subplot(xlabel="GiB at the peak of a training step")
    rows, ends = range(len(estimates)), np.zeros(len(estimates))
    for part in parts:
        sizes = np.array([estimate.parts.get(part, 0) / GIB for estimate in estimates.values()])
        color = PART_COLORS.get(part, MUTED)
        axes.barh(rows, sizes, 0.66, left=ends, color=color, edgecolor="white", linewidth=0.6, label=part)
        ends += sizes
    card = (card_bytes or 0) / GIB
    longest = max(*ends, card)
    for row, end in enumerate(ends):
        color = VALIDATION if card and end > card else "black"
        axes.text(end + longest * 0.012, row, f"{end:.1f}", va="center", color=color, fontweight="bold")
    if card:
        _mark_limit(axes, card, f"{card_name}: {card:.1f}", ha="right", color="black")
    axes.set_yticks(rows, list(estimates))
    axes.set_xlim(0, longest * 1.1)
    axes.invert_yaxis()
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.legend(loc="outside lower center", ncols=4)
    return figure


def picture(figure: Figure, words: str = "") -> Image:
    """`figure` as a PNG. The kit's figures are made without pyplot, so a notebook does not show them by itself.

    Args:
        words: what is to be seen, for readers who cannot see it.
    """
    from IPython.display import Image

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    metadata = {"alt": words}  # the argument alt= is unknown to Colab's IPython 7
    return Image(buffer.getvalue(), format="png", embed=True, metadata=metadata)


def has_notebook() -> bool:
    """True inside a Jupyter kernel (which can update what it has displayed), False in a terminal or a script."""
    from IPython import get_ipython

    return getattr(get_ipython(), "kernel", None) is not None


class Place:
    """One place below a cell, whose picture is replaced without flicker: a display handle."""

    def __init__(self) -> None:
        self._handle: Any = None

    def show(self, figure: Figure, words: str = "") -> None:
        """Put `figure` there; `words` as in `picture`."""
        from IPython.display import display

        if self._handle is None:
            self._handle = display(picture(figure, words), display_id=True)
        else:
            self._handle.update(picture(figure, words))


def _points(history: History, key: str) -> tuple[list[int], list[float]]:
    """(steps, values) of the events that have a number under `key`."""
    events = [event for event in history if event.get(key) is not None]
    return [event["step"] for event in events], [event[key] for event in events]


def _draw_losses(axes: Axes, history: History, max_steps: int | None) -> None:
    """All names stand in a legend below the axes, where they hide no curve."""
    axes.set(xlabel="optimizer step", ylabel="loss per answer token")
    axes.set_xlim(-0.4, (max_steps or max([1, *(event["step"] for event in history)])) + 0.4)
    axes.margins(y=0.14)
    axes.grid(axis="y", alpha=0.25)
    steps, losses = _points(history, "eval_loss")
    axes.plot(*_points(history, "loss"), color=TRAIN, marker=".", label="training loss")
    axes.plot(steps, losses, color=VALIDATION, marker="o", label="validation loss")
    if losses:
        axes.axhline(losses[0], color=MUTED, lw=1.2, ls=":", zorder=0, label=f"untrained model: {losses[0]:.2f}")
    _ring_best(axes, history, BEST, label="best: {loss:.2f} at step {step}")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=4)


def _ring_best(axes: Axes, history: History, color: str, label: str = "") -> None:
    """A ring around the best trained step, if there is one: step 0 is the untrained model."""
    trained = [(loss, step) for step, loss in zip(*_points(history, "eval_loss")) if step > 0]
    if trained:
        loss, step = min(trained)
        ring = axes.scatter(step, loss, s=180, facecolors="none", edgecolors=color, linewidths=1.9, clip_on=False)
        ring.set(zorder=3, label=label.format(loss=loss, step=step))


def _covered(token_lengths: Sequence[int], max_length: int) -> str:
    """Share of the examples that fit whole, rounded down, so that "100 %" means every one."""
    fitting = sum(length <= max_length for length in token_lengths)
    return f"{1000 * fitting // max(1, len(token_lengths)) / 10:g} %"


def _mark_limit(axes: Axes, x: float, words: str, ha: str, color: str, **style: Any) -> None:
    """A dashed vertical line with words above it, to its left (`ha="right"`) or right."""
    axes.axvline(x, color=color, linewidth=1.5, linestyle="--")
    axes.text(x, 1.02, words, transform=axes.get_xaxis_transform(), ha=ha, color=color, fontsize=8.5, **style)

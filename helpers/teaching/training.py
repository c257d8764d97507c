"""Charts of lesson 04: what checkpointing saves at which length, and how the learning rate moves.

saving_chart({"SmolLM2-135M": {128: 0.2, 512: 0.5}}, quoted=0.6)
schedule_chart({"cosine": [0.0, 1e-4, 2e-4, 1e-4, 0.0]}, warmup_steps=2)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from helpers.charts import MUTED, VALIDATION

MARKERS = "osD^vPX*<>"  # colour alone would be lost in print


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

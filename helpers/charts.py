"""Every figure, as a function that returns a matplotlib `Figure` (never a window, never pyplot's global state).

loss_chart(run.history).savefig("loss.png")
"""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

TRAIN, VALIDATION, BEST, MUTED = "#4c78a8", "#e45756", "#2f7d4f", "#7a7a7a"  # told apart in colour blindness and in grey


def loss_chart(history: list[dict[str, Any]], total_steps: int | None = None, title: str = "") -> Figure:
    """Training and validation loss over optimizer steps, with the step of the lowest validation loss marked.

    Args:
        history: log events with the keys that TRL writes (`step`, `loss`, `eval_loss`).
        total_steps: length of the whole run, so that the axis does not move while it trains.
    """
    train = [(event["step"], event["loss"]) for event in history if "loss" in event]
    validation = [(event["step"], event["eval_loss"]) for event in history if "eval_loss" in event]
    figure = Figure(figsize=(7.2, 3.8), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    if train:
        axes.plot(*zip(*train), color=TRAIN, linewidth=1.8, marker=".", markersize=5, label="training loss")
    if validation:
        axes.plot(*zip(*validation), color=VALIDATION, linewidth=1.8, marker="o", markersize=5, label="validation loss")
        axes.annotate(
            f"untrained model: {validation[0][1]:.2f}", (1, validation[0][1]), xycoords=("axes fraction", "data"), xytext=(-4, 4),
            textcoords="offset points", ha="right", fontsize=8.5, color=MUTED,
        )  # fmt: skip
        axes.axhline(validation[0][1], color=MUTED, linewidth=0.8, linestyle=":", zorder=0)
    trained = [point for point in validation if point[0] > 0]
    if trained:
        best_step, best_loss = min(trained, key=lambda point: point[1])
        axes.scatter([best_step], [best_loss], s=190, facecolors="none", edgecolors=BEST, linewidths=2, zorder=3, clip_on=False)
        axes.annotate(
            f"best: {best_loss:.2f} at step {best_step}", (best_step, best_loss), xytext=(0, 16), textcoords="offset points",
            ha="right", color=BEST, fontweight="bold",
        )  # fmt: skip
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss per answer token")
    axes.set_title(title, loc="left", fontsize=10.5)
    axes.set_xlim(-0.4, (total_steps or max([1, *[event["step"] for event in history]])) + 0.4)
    axes.margins(y=0.14)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    if train or validation:
        axes.legend(frameon=False, loc="lower left")
    return figure

"""Figures are figures: what they must show is on them, and nothing leaks into pyplot."""

import io

import matplotlib
import numpy as np
import pytest

from helpers.memory import GIB, estimate
from helpers.plots import loss_chart, memory_chart
from helpers.registry import CATALOG

HISTORY = [
    {"step": 0, "eval_loss": 4.0},
    {"step": 5, "loss": 3.5},
    {"step": 10, "loss": 2.5, "grad_norm": 1.0},
    {"step": 10, "eval_loss": 2.8},
    {"step": 20, "loss": 1.5},
    {"step": 20, "eval_loss": 3.1},
]
LLAMA_8B = CATALOG["Llama-3.1-8B-Instruct"].shape


def texts(figure):
    found = [text.get_text() for axes in figure.axes for text in axes.texts]
    legends = [*figure.legends, *(axes.get_legend() for axes in figure.axes if axes.get_legend())]
    return " | ".join(found + [text.get_text() for legend in legends for text in legend.get_texts()])


def test_the_loss_chart_shows_both_losses_and_marks_the_best_trained_step():
    figure = loss_chart(HISTORY, total_steps=20)
    assert "best: 2.80 at step 10" in texts(figure) and "untrained model: 4.00" in texts(figure)
    assert "training loss" in texts(figure) and "validation loss" in texts(figure)


def test_the_loss_chart_can_be_drawn_at_any_moment():
    for count in range(len(HISTORY) + 1):
        loss_chart(HISTORY[:count]).savefig(io.BytesIO(), format="png")


@pytest.mark.parametrize("kind", ["overfit", "falling", "flat", "half way"])
def test_the_name_of_the_best_step_hides_no_curve_and_stays_on_the_chart(kind):
    validation = {
        "overfit": [6, 5.4, 4.1, 4.5, 5.6],
        "falling": [6, 5, 4.5, 4.2, 4.1],
        "flat": [6, 5.99, 5.98, 5.97, 5.96],
        "half way": [6, 5, 4.2],
    }[kind]
    history = [{"step": 2 * n, "eval_loss": loss} for n, loss in enumerate(validation)]
    history += [
        {"step": 2 * n + 1, "loss": loss - (1.5 if kind == "overfit" else 0.1)} for n, loss in enumerate(validation)
    ]
    figure = loss_chart(history, total_steps=10)
    figure.savefig(io.BytesIO(), format="png")  # the layout is final now
    axes = figure.axes[0]
    [label] = [text for text in axes.texts if text.get_text().startswith("best:")]
    box = label.get_window_extent()
    assert (
        axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1 + 5 and axes.bbox.y0 - 5 <= box.y0 and box.y1 <= axes.bbox.y1
    )
    for line in axes.lines[:2]:
        xs, ys = axes.transData.transform(line.get_xydata()).T
        dense = np.linspace(xs[0], xs[-1], 2000)
        heights = np.interp(dense, xs, ys)
        under = (dense > box.x0) & (dense < box.x1) & (heights > box.y0) & (heights < box.y1)
        assert under.sum() <= 10, f"{line.get_label()} runs through the words"


def test_the_memory_chart_stacks_to_the_total_and_marks_what_is_too_much():
    rows = {"on": estimate(LLAMA_8B, 1, 2048), "off": estimate(LLAMA_8B, 1, 2048, checkpointing="off")}
    figure = memory_chart(rows, 8 * GIB, "RTX 4060")
    axes = figure.axes[0]
    ends = {
        bar.get_y(): max(b.get_x() + b.get_width() for b in axes.patches if b.get_y() == bar.get_y())
        for bar in axes.patches
    }
    assert sorted(round(end, 6) for end in ends.values()) == sorted(
        round(row.total_bytes / GIB, 6) for row in rows.values()
    )
    colors = {text.get_text(): text.get_color() for text in axes.texts}
    assert len({colors[f"{row.total_bytes / GIB:.1f}"] for row in rows.values()}) == 2
    assert "RTX 4060: 8.0" in texts(figure)


def test_drawing_leaves_pyplot_alone():
    memory_chart({"on": estimate(LLAMA_8B, 1, 2048)}, 14 * GIB, "T4").savefig(io.BytesIO(), format="png")
    assert "matplotlib.pyplot" not in __import__("sys").modules or not matplotlib.pyplot.get_fignums()

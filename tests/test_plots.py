"""Figures are figures: what they must show is on them, and nothing leaks into pyplot."""

import io
import sys

import matplotlib
import pytest

from helpers.hardware import GIB
from helpers.memory import estimate
from helpers.plots import comparison_chart, loss_chart, memory_chart, training_chart
from helpers.registry import CATALOG

HISTORY = [
    {"step": 0, "eval_loss": 4.0},
    {"step": 5, "loss": 3.5},
    {"step": 10, "loss": 2.5, "grad_norm": 1.0, "peak_bytes": 3 * GIB},
    {"step": 10, "eval_loss": 2.8},
    {"step": 20, "loss": 1.5},
    {"step": 20, "eval_loss": 3.1},
]
LLAMA_8B = CATALOG["Llama-3.1-8B-Instruct"].shape


def texts(figure):
    found = [text.get_text() for axes in figure.axes for text in axes.texts]
    legends = [*figure.legends, *(axes.get_legend() for axes in figure.axes if axes.get_legend())]
    return " | ".join(found + [text.get_text() for legend in legends for text in legend.get_texts()])


@pytest.mark.parametrize("chart", [loss_chart, training_chart])
def test_both_losses_are_named_below_the_axes_and_the_best_trained_step_is_ringed(chart):
    figure = chart(HISTORY, max_steps=20)
    figure.savefig(io.BytesIO(), format="png")  # the layout is final now
    for words in ("training loss", "validation loss", "best: 2.80 at step 10", "untrained model: 4.00"):
        assert words in texts(figure)
    axes = figure.axes[0]
    names = axes.get_legend().get_window_extent()
    assert names.y1 < axes.bbox.y0, "the names hide a curve"
    assert names.x0 >= 0 and names.x1 <= figure.bbox.x1 and (len(figure.axes) > 1 or names.y0 >= 0)
    [ring] = axes.collections
    assert ring.get_offsets().tolist() == [[10, 2.8]]


def test_the_training_chart_says_what_the_curve_says_and_compares_memory_with_the_plan():
    figure = training_chart(HISTORY, 20, "step 20 of 20", "overfitting since step 10", planned_bytes=4 * GIB)
    assert figure.get_suptitle() == "overfitting since step 10" and "3.0 GiB | 4.0 GiB" in texts(figure)


@pytest.mark.parametrize("count", range(len(HISTORY) + 1))
def test_charts_can_be_drawn_at_any_moment_and_a_dollar_is_no_mathematics(count):
    name = r"pays $\bad{$ a^$"
    training_chart(HISTORY[:count], title=name, diagnosis=name).savefig(io.BytesIO(), format="png")
    comparison_chart({name: HISTORY[:count], "b": HISTORY}).savefig(io.BytesIO(), format="png")
    memory_chart({name: estimate(LLAMA_8B, 1, 2048)}, GIB, name).savefig(io.BytesIO(), format="png")


def test_the_memory_chart_stacks_to_the_total_and_marks_what_is_too_much():
    rows = {"on": estimate(LLAMA_8B, 1, 2048), "off": estimate(LLAMA_8B, 1, 2048, checkpointing="off")}
    figure = memory_chart(rows, 8 * GIB, "RTX 4060")
    ends = {}
    for bar in figure.axes[0].patches:
        ends[bar.get_y()] = max(ends.get(bar.get_y(), 0), bar.get_x() + bar.get_width())
    assert list(ends.values()) == pytest.approx([row.total_bytes / GIB for row in rows.values()])
    colors = {text.get_text(): text.get_color() for text in figure.axes[0].texts}
    assert len({colors[f"{row.total_bytes / GIB:.1f}"] for row in rows.values()}) == 2
    assert "RTX 4060: 8.0" in texts(figure)


def test_drawing_leaves_pyplot_alone():
    before = dict(matplotlib.rcParams)
    memory_chart({"one": estimate(LLAMA_8B, 1, 2048)}).savefig(io.BytesIO(), format="png")
    assert "matplotlib.pyplot" not in sys.modules or not matplotlib.pyplot.get_fignums()
    assert dict(matplotlib.rcParams) == before

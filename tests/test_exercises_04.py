"""The checks of lesson 04 tell right from wrong, whatever they are given; its charts show what they were given."""

import pytest
import torch

from helpers.plots import VALIDATION, picture
from helpers.registry import CATALOG
from notebooks.lessons.lesson_04 import (
    check_accumulate,
    check_length,
    check_steps,
    saved_by_checkpointing,
    saving_chart,
    schedule_chart,
)

SHAPE, LENGTHS = CATALOG["Llama-3.2-1B-Instruct"].shape, (128, 512, 2048, 4096)


@pytest.mark.parametrize(
    "answer, verdict",
    [
        ((6, 21), "Right"),
        ([6.0, 21.0], "Right"),
        (None, "Your turn"),
        ((6, 20), "Not yet"),
        ((6, 488 / 24), "Not yet"),
        ((6, 122), "Not yet"),
        ((24, 21), "Not yet"),
        ((0, 0), "Not yet"),
        (6, "Not yet"),
        ("no", "Not yet"),
        ((1, 2, 3), "Not yet"),
        ((float("nan"),) * 2, "Not yet"),
        ([None, 3], "Not yet"),
        (torch.ones(2, 2), "Not yet"),
    ],
)
def test_steps(said, answer, verdict):
    assert said(check_steps, answer, examples=488, effective_batch=24, micro_batch=4).startswith(verdict)


def test_steps_of_an_epoch_that_comes_out_even(said):
    assert (
        said(check_steps, (2, 5), examples=40, effective_batch=8, micro_batch=4).startswith(
            "Not yet: accumulation is right"
        )
        is False
    )


def test_length(said):
    right = next(length for length in LENGTHS if saved_by_checkpointing(SHAPE, length) >= 0.6)
    assert LENGTHS[0] < right < LENGTHS[-1]
    assert said(check_length, right, SHAPE, LENGTHS).startswith("Right")
    for wrong in (*(length for length in LENGTHS if length != right), 100, -1, "256", True, [right], float("nan"), {}):
        assert said(check_length, wrong, SHAPE, LENGTHS).startswith("Not yet")
    assert "shorter" in said(check_length, LENGTHS[-1], SHAPE, LENGTHS)
    assert said(check_length, None, SHAPE, LENGTHS).startswith("Your turn")


def accumulating(weight, clear=True, step=False):
    def accumulate(model, micro_batches):
        if clear:
            model.zero_grad()
        total = sum(len(targets) for _, targets in micro_batches)
        for inputs, targets in micro_batches:
            (((model(inputs).squeeze(-1) - targets) ** 2).sum() * weight(len(targets), total)).backward()
        if step:
            torch.optim.SGD(model.parameters(), lr=0.1).step()

    return accumulate


@pytest.mark.parametrize(
    "function, line",
    [
        (accumulating(lambda rows, total: 1 / total), "Right"),
        (accumulating(lambda rows, total: 1 / total, clear=False), "Not yet: right the first time"),
        (accumulating(lambda rows, total: 1 / total, step=True), "Not yet: the weights changed"),
        (accumulating(lambda rows, total: 1 / rows / 3), "Not yet: a row of a small micro-batch"),
        (accumulating(lambda rows, total: 1 / rows), "Not yet: a row of a small micro-batch"),
        (accumulating(lambda rows, total: 1), "Not yet: this is the gradient of the sum"),
        (accumulating(lambda rows, total: 7), "Not yet: the gradient is another one"),
        (lambda model, micro_batches: None, "Not yet: your function"),
        (lambda: None, "Not yet: your function"),
        (3, "Not yet: the answer is the function"),
        (None, "Your turn"),
    ],
)
def test_accumulate(said, function, line):
    assert said(check_accumulate, function).startswith(line)


def test_the_saving_chart_shows_each_model_and_the_quoted_number():
    figure = saving_chart({"small": {128: 0.1, 256: 0.4}, "large": {128: 0.2, 256: 0.7}}, quoted=0.6)
    axes = figure.axes[0]
    assert [line.get_label() for line in axes.get_lines()[:2]] == ["small", "large"]
    assert list(axes.get_lines()[1].get_ydata()) == pytest.approx([20, 70])
    assert axes.get_lines()[2].get_color() == VALIDATION and axes.get_lines()[2].get_ydata()[0] == pytest.approx(60)
    assert "tokens" in axes.get_xlabel() and "%" in axes.get_ylabel()


def test_the_schedule_chart_starts_at_step_one_and_shades_the_warmup():
    axes = schedule_chart({"linear": [0.0, 1e-4, 5e-5]}, warmup_steps=1).axes[0]
    assert list(axes.get_lines()[0].get_xdata()) == [1, 2, 3] and axes.get_xlabel() == "optimizer step"
    assert len(axes.patches) == 1 and not schedule_chart({"linear": [1e-4]}, warmup_steps=0).axes[0].patches


def test_a_picture_is_a_png_with_words():
    image = picture(schedule_chart({"linear": [1e-4]}, 0), "flat")
    assert image.data.startswith(b"\x89PNG") and image.metadata["alt"] == "flat"

"""The checks of lesson 04 tell right from wrong, whatever they are given; its charts show what they were given."""

from functools import partial

import pytest
import torch

from helpers.plots import VALIDATION
from helpers.registry import CATALOG
from notebooks.lessons import lesson_04 as lesson
from tests.exercises import answers

SHAPE, LENGTHS = CATALOG["Llama-3.2-1B-Instruct"].shape, (128, 512, 2048, 4096)


def accumulating(weight, clear=True, learning_rate=0.0):
    def accumulate(model, micro_batches):
        if clear:
            model.zero_grad()
        total = sum(len(targets) for _, targets in micro_batches)
        for inputs, targets in micro_batches:
            (((model(inputs).squeeze(-1) - targets) ** 2).sum() * weight(len(targets), total)).backward()
        torch.optim.SGD(model.parameters(), lr=learning_rate).step()

    return accumulate


def concatenated(model, micro_batches):
    model.zero_grad()
    inputs, targets = (torch.cat(parts) for parts in zip(*micro_batches))
    ((model(inputs).squeeze(-1) - targets) ** 2).mean().backward()


def row_by_row(model, micro_batches):
    rows = [row for inputs, targets in micro_batches for row in zip(inputs.split(1), targets.split(1))]
    accumulating(lambda rows, total: 1 / total)(model, rows)


@answers(
    {
        partial(lesson.check_steps, examples=488, effective_batch=24, micro_batch=4): [
            ((6, 21), "Right"),
            ([6.0, 21.0], "Right"),
            ((6, 20), "fewer examples"),
            ((6, 488 / 24), "fewer examples"),
            ((6, 122), "accumulation is right"),
            ((24, 21), "would see 96 examples"),
            ((0, 0), "would see 0 examples"),
            (6, "a pair of numbers"),
            ((1, 2, 3), "a pair of numbers"),
            (torch.ones(2, 2), "a pair of numbers"),
        ],
        partial(lesson.check_steps, examples=40, effective_batch=8, micro_batch=4): [  # an epoch that comes out even
            ((2, 5), "Right"),
            ((2, 4), "one update"),
            ((2, 10), "one update"),
            ((1, 5), "would see 4 examples"),
            ((4, 5), "would see 16 examples"),
        ],
        partial(lesson.check_length, shape=SHAPE, lengths=LENGTHS): [
            (2048, "Right"),
            (128, "too little"),
            (512, "too little"),
            (4096, "shorter"),
            (100, "one of the lengths"),
        ],
        lesson.check_accumulate: [
            (accumulating(lambda rows, total: 1 / total), "Right"),
            (row_by_row, "Right"),
            (accumulating(lambda rows, total: 1 / total, clear=False), "Not yet: right the first time"),
            (accumulating(lambda rows, total: 1 / total, learning_rate=0.1), "Not yet: the weights changed"),
            (accumulating(lambda rows, total: 1 / rows / 3), "Not yet: a row of a small micro-batch"),
            (accumulating(lambda rows, total: 1 / rows), "Not yet: a row of a small micro-batch"),
            (accumulating(lambda rows, total: 1), "Not yet: this is the gradient of the sum"),
            (accumulating(lambda rows, total: 7), "Not yet: the gradient is another one"),
            (concatenated, "Not yet: 8 rows went through the model at once"),
            (lambda model, micro_batches: None, "left no gradient"),
        ],
    }
)
def test_answers(said, check, answer, words):
    said(check, answer, words)


def test_the_length_in_question_is_neither_the_first_nor_the_last():
    assert next(length for length in LENGTHS if lesson.saved_by_checkpointing(SHAPE, length) >= 0.6) == 2048


def test_the_saving_chart_shows_each_model_and_the_quoted_number():
    axes = lesson.saving_chart({"small": {128: 0.1, 256: 0.4}, "large": {128: 0.2, 256: 0.7}}, quoted=0.6).axes[0]
    small, large, quoted = axes.get_lines()
    assert [small.get_label(), large.get_label()] == ["small", "large"]
    assert list(large.get_ydata()) == pytest.approx([20, 70])
    assert quoted.get_color() == VALIDATION and quoted.get_ydata()[0] == pytest.approx(60)
    assert "tokens" in axes.get_xlabel() and "%" in axes.get_ylabel()


def test_the_schedule_chart_starts_at_step_one_and_shades_the_warmup():
    axes = lesson.schedule_chart({"linear": [0.0, 1e-4, 5e-5]}, warmup_steps=1).axes[0]
    assert list(axes.get_lines()[0].get_xdata()) == [1, 2, 3] and axes.get_xlabel() == "optimizer step"
    assert len(axes.patches) == 1 and not lesson.schedule_chart({"linear": [1e-4]}, warmup_steps=0).axes[0].patches

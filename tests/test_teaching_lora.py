"""Lesson 02's helpers: the short training really trains, ranks can be compared fairly, charts show what they must."""

import pytest
import torch

from helpers.data.tokens import MASKED, Tokens
from helpers.evaluation import answer_losses, mean_loss
from helpers.models import attach_lora
from helpers.plots import picture
from notebooks.lessons import lesson_02 as lesson


@pytest.fixture
def prepared(job):
    training = lesson.short_examples(job["training"], job["tokenizer"], 8)
    validation = lesson.short_examples(job["validation"], job["tokenizer"], 4)
    return job, training, validation


def test_short_examples_are_the_shortest_in_their_order(job):
    everything = lesson.short_examples(job["training"], job["tokenizer"], len(job["training"]))
    some = lesson.short_examples(job["training"], job["tokenizer"], 5)
    lengths = [len(tokens.ids) for tokens in everything]
    assert sorted(len(tokens.ids) for tokens in some) == sorted(lengths)[:5]
    places = [everything.index(tokens) for tokens in some]
    assert places == sorted(places)


def test_the_validation_loss_is_the_one_that_the_evaluation_reports(prepared):
    job, _, _ = prepared
    tokens = lesson.short_examples(job["validation"], job["tokenizer"], len(job["validation"]))
    expected = mean_loss(answer_losses(job["model"], job["tokenizer"], job["validation"]))
    assert lesson.validation_loss(job["model"], tokens) == pytest.approx(expected, rel=1e-4)


def test_a_short_training_lowers_the_loss_and_leaves_the_base_alone(prepared):
    job, training, validation = prepared
    model = attach_lora(job["model"], job["config"])
    frozen = {name: parameter.clone() for name, parameter in model.named_parameters() if not parameter.requires_grad}
    run = lesson.short_training(model, training, validation, steps=12, batch=4, learning_rate=5e-3)
    assert len(run.training) == 12 and run.training[-1] < run.training[0] and run.after < run.before and run.seconds > 0
    assert all(torch.equal(parameter, frozen[name]) for name, parameter in model.named_parameters() if name in frozen)


def test_every_rank_starts_at_the_same_loss(prepared):
    job, training, validation = prepared
    runs = []
    for rank in (1, 8):
        job["config"].r = rank
        runs.append(lesson.short_training(attach_lora(job["model"], job["config"]), training, validation, steps=1))
    assert runs[0].before == runs[1].before and runs[0].training == runs[1].training


def test_a_batch_counts_tokens_and_not_examples(prepared):
    job, training, _ = prepared
    model = attach_lora(job["model"], job["config"])
    one, other = training[0], Tokens(training[1].ids, [*training[1].labels[:-2], MASKED, MASKED])
    run = lesson.short_training(model, [one, other], [one], steps=1, batch=2, learning_rate=0.0)
    assert run.training[0] == pytest.approx(lesson.validation_loss(model, [one, other]), rel=1e-4)


def test_the_rank_chart_shows_every_rank_and_the_untrained_model():
    runs = {rank: lesson.ShortRun([4.0, 3.0], before=4.0, after=3.5 - rank / 100, seconds=1.0) for rank in (1, 4, 16)}
    figure = lesson.rank_chart(runs)
    words = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert "untrained: 4.00" in words and {"3.49", "3.46", "3.34"} <= set(words)
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["rank 1", "rank 4", "rank 16"]
    assert picture(figure).data


def test_areas_of_the_shapes_are_the_numbers_of_weights():
    figure = lesson.shapes_chart(576, 576, 16)
    areas = [abs(patch.get_width() * patch.get_height()) for patch in figure.axes[0].patches]
    assert areas == [576 * 576, 576 * 16, 576 * 16]
    assert any("331,776" in text.get_text() for text in figure.axes[0].texts)

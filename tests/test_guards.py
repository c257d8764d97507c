"""Mistakes that would train with a normal-looking curve are found before the first step, each with its fix."""

import pytest
from conftest import make_job
from datasets import Dataset

from helpers.config import ConfigError
from helpers.data import DataError
from helpers.guards import check_before_training
from helpers.train import build_trainer, train


def messages(question, answer):
    return {"prompt": [{"role": "user", "content": question}], "completion": [{"role": "assistant", "content": answer}]}


def test_a_sound_job_passes_without_a_word(job, tmp_path, capsys):
    job["config"].learning_rate = 2e-4
    trainer = build_trainer(**job, output_dir=tmp_path)
    capsys.readouterr()
    check_before_training(trainer, job["config"])
    assert capsys.readouterr().out == ""


def test_answers_that_max_length_cuts_away_leave_nothing_to_train(job, tmp_path):
    job["training"] = Dataset.from_list([messages("x" * 400, "yes") for _ in range(8)])
    with pytest.raises(DataError, match=r"Every label is masked.*max_length is 128"):
        train(**job, root=tmp_path)
    assert not (tmp_path / "tiny" / "run.json").exists()


def test_answers_that_are_all_cut_never_learn_to_end(job, tmp_path):
    job["training"] = Dataset.from_list([messages("x", "yes " * 200) for _ in range(8)])
    with pytest.raises(DataError, match=r"No answer ends with a trained end token.*never learn to stop"):
        train(**job, root=tmp_path)


def test_two_examples_that_the_template_makes_equal_are_refused(job, tmp_path):
    job[
        "tokenizer"
    ].chat_template = (
        "{% for message in messages %}{% if message.role == 'assistant' %}yes<|im_end|>{% endif %}{% endfor %}"
    )
    with pytest.raises(DataError, match="get identical tokens"):
        train(**job, root=tmp_path)


def test_some_cut_answers_are_a_warning(job, tmp_path, capsys):
    job["training"] = Dataset.from_list([messages(f"x{n}", "yes " * (200 if n == 3 else 2)) for n in range(8)])
    check_before_training(build_trainer(**job, output_dir=tmp_path), job["config"])
    assert "[WARN] 1 of the first 8 examples do not end with the end token: they are cut" in capsys.readouterr().out


def test_examples_whose_answer_is_cut_away_are_counted(job, tmp_path, capsys):
    job["training"] = Dataset.from_list([messages("x" * (400 if n < 2 else 4), "yes") for n in range(8)])
    check_before_training(build_trainer(**job, output_dir=tmp_path), job["config"], len(job["training"]))
    assert "2 of 8 examples are left out: max_length (128) cuts their whole answer" in capsys.readouterr().out


def test_a_missing_template_is_named_before_trl_fails(job, tmp_path):
    job["tokenizer"].chat_template = None
    with pytest.raises(DataError, match=r"no chat template.*Instruct"):
        train(**job, root=tmp_path)


def test_nothing_trainable(job, tmp_path):
    trainer = build_trainer(**job, output_dir=tmp_path)
    trainer.model.requires_grad_(False)
    with pytest.raises(ConfigError, match="No parameter is trainable"):
        check_before_training(trainer, job["config"])


def test_adapters_that_are_not_fp32_are_refused(job, tmp_path):
    import torch

    trainer = build_trainer(**job, output_dir=tmp_path)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    with pytest.raises(ConfigError, match="bfloat16"):
        check_before_training(trainer, job["config"])


@pytest.mark.parametrize("rate, words", [(1e-6, "slow"), (5e-3, "may diverge"), (2e-4, None)])
def test_an_odd_learning_rate_is_a_warning(job, tmp_path, capsys, rate, words):
    job["config"].learning_rate = rate
    trainer = build_trainer(**job, output_dir=tmp_path)
    capsys.readouterr()
    check_before_training(trainer, job["config"])
    out = capsys.readouterr().out
    assert words in out if words else not out


def test_an_absurd_learning_rate_is_refused(job, tmp_path):
    job["config"].learning_rate = 1.0
    with pytest.raises(ConfigError, match="would destroy the model"):
        train(**job, root=tmp_path)


def test_more_examples_per_step_than_there_are(tiny_model, tmp_path, alpaca_rows):
    job = make_job(tiny_model, alpaca_rows, effective_batch_size=64)
    with pytest.raises(
        ConfigError, match=r"effective_batch_size=64 is larger than the 18 training examples.*Use 4 or less"
    ):
        train(**job, root=tmp_path)

"""Mistakes that would train with a normal-looking curve are found before the first step, each with its fix."""

import json
import pickle
from dataclasses import replace

import pytest
from conftest import make_job
from datasets import Dataset

from helpers.config import ConfigError
from helpers.data import DataError, load_examples, split
from helpers.evaluation import evaluate
from helpers.export import export_plan
from helpers.guards import check_before_training, check_job
from helpers.models import load_adapter
from helpers.planner import make_plan
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


@pytest.mark.parametrize("rate, words", [(1e-6, "slow"), (5e-3, "may diverge"), (2e-4, None)])
def test_an_odd_learning_rate_is_a_warning(job, tmp_path, capsys, rate, words):
    job["config"].learning_rate = rate
    trainer = build_trainer(**job, output_dir=tmp_path)
    capsys.readouterr()
    check_before_training(trainer, job["config"])
    out = capsys.readouterr().out
    assert words in out if words else not out


def test_more_examples_per_step_than_there_are(tiny_model, tmp_path, alpaca_rows):
    job = make_job(tiny_model, alpaca_rows, effective_batch_size=64)
    with pytest.raises(
        ConfigError, match=r"effective_batch_size=64 is larger than the 18 training examples.*Use 4 or less"
    ):
        train(**job, root=tmp_path)


# ----------------------------------------------------------------------------------------------- do they belong together?


@pytest.mark.parametrize(
    "changed",
    [{"max_length": 64, "effective_batch_size": 2}, {"model": "another"}, {"quantization": "none"}, {"r": 8}],
    ids=str,
)
def test_a_plan_of_other_settings_is_refused_before_anything_is_written(job, tmp_path, changed):
    for field, value in changed.items():
        setattr(job["config"], field, value)
    now = ", ".join(f"{field}={value!r}" for field, value in changed.items())
    with pytest.raises(
        ConfigError, match=f"The plan was made with .*the settings now say {now}: run the cell with make_plan"
    ):
        train(**job, root=tmp_path / "runs")
    with pytest.raises(ConfigError, match="The plan was made with"):
        export_plan(job["config"], job["plan"], job["training"], job["validation"], tmp_path / "export")
    assert not any(tmp_path.iterdir())


def test_a_model_that_was_loaded_for_another_plan_is_refused(job, tmp_path):
    for plan in (replace(job["plan"], model="another"), replace(job["plan"], dtype="float16")):
        with pytest.raises(ConfigError, match=r"The model was made with .*run the cell with load_quantized"):
            train(**job | {"plan": plan}, root=tmp_path)
    job["config"].quantization = "none"
    job["plan"] = make_plan(job["config"], job["plan"].gpu)  # as the message says, and not the model
    with pytest.raises(ConfigError, match=r"The model was made with quantization='nf4'.*load_quantized"):
        train(**job, root=tmp_path)


def test_examples_know_their_file_and_how_they_were_split(job, tmp_path, alpaca_rows):
    """Whatever is done with them; those that were made by hand are taken as they are."""
    config, file = job["config"], tmp_path / "letters.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in alpaca_rows))
    config.data = file
    training, validation = split(load_examples(config.data), config.validation_share, config.seed)
    training = pickle.loads(pickle.dumps(training.map(lambda row: row).select(range(9)).shuffle(seed=1)))
    check_job(config, job["plan"], None, training, validation)
    for field, value in {"data": "others.jsonl", "validation_share": 0.1, "seed": 7}.items():
        changed = replace(config, **{field: value})
        with pytest.raises(ConfigError, match=rf"The data was made with {field}=.*{value}.*run the cell with split"):
            train(**job | {"config": changed, "training": training, "validation": job["validation"]}, root=tmp_path)
        check_job(changed, job["plan"], None, *split(Dataset.from_list(list(training)), 0.4, 3))


@pytest.mark.parametrize("part", ["training", "validation"])
def test_nothing_to_train_on_or_to_validate_with(job, tmp_path, part):
    with pytest.raises(DataError, match="no examples to train on, or none to validate with"):
        train(**job | {part: job[part].select([])}, root=tmp_path)


@pytest.mark.parametrize(
    ("field", "value"), [("name", "../../escape"), ("warmup_ratio", 5), ("data", ["a"]), ("learning_rate", "2e-4")]
)
def test_a_setting_that_was_spoilt_after_construction_is_refused(job, tmp_path, field, value):
    setattr(job["config"], field, value)
    for cell in (lambda: train(**job, root=tmp_path / "runs"), lambda: make_plan(job["config"], job["plan"].gpu)):
        with pytest.raises(ConfigError, match=f"^{field}="):
            cell()
    assert not any(tmp_path.iterdir())


def test_a_run_is_judged_by_its_own_adapter_and_by_examples_that_it_did_not_see(job, tmp_path, alpaca_rows):
    file = tmp_path / "letters.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in alpaca_rows))
    job["config"].data, job["config"].max_steps = file, 1
    examples = load_examples(file)
    job["training"], job["validation"] = split(examples, 0.25, 42)
    run = train(**job, root=tmp_path)
    judge = lambda examples: evaluate(run, job["tokenizer"], examples, max_new_tokens=2, forgetting=False)  # noqa: E731
    for seen in (examples, split(examples, 0.25, 7)[1]):
        with pytest.raises(ConfigError, match=r"This part of the data was made with.*split\(load_examples"):
            judge(seen)
    judge(job["validation"])
    job["config"].learning_rate = 1e-3
    train(**job, root=tmp_path)  # in the same base model, so the first run's adapter is gone from it
    with pytest.raises(ValueError, match="load_adapter"):
        judge(job["validation"])
    run.model = load_adapter(run.adapter, run.model)
    judge(job["validation"])

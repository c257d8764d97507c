"""What the quickstart promises, measured on the run that `make quickstart` has just left in runs/quickstart.

Times and sizes are printed. They depend on the machine, so a time fails only above one and a half times its bar.
"""

import json

import pytest

from helpers.metrics import follows_house_style
from helpers.runs import Run
from tests.golden import EXACT, LOOSE, RECORD, golden

pytestmark = pytest.mark.slow

MINUTES, PEAK_GIB, NOISE = 10, 4.0, 1.5


@pytest.fixture(scope="module")
def folder(root):
    folder = root / "runs/quickstart"
    assert (folder / "run.json").is_file(), "no run to look at: `make quickstart` first"
    return folder


@pytest.fixture(scope="module")
def run(folder):
    return Run.load(folder)


@pytest.fixture(scope="module")
def answers(folder):
    return [json.loads(line) for line in (folder / "evaluation.jsonl").read_text(encoding="utf-8").splitlines()]


def test_it_stays_within_time_and_memory(folder, say):
    first = json.loads((folder / "executions.jsonl").read_text().splitlines()[0])  # later ones find the finished run
    say(f"quickstart: {first['seconds'] / 60:.1f} of {MINUTES} minutes, {first['peak_memory_gib']} of {PEAK_GIB} GiB")
    assert first["seconds"] < MINUTES * 60 * NOISE
    assert first["peak_memory_gib"] <= PEAK_GIB


def test_the_validation_loss_falls_by_thirty_percent(run, say):
    fall = 1 - run.best_eval_loss / run.first_eval_loss
    print(
        f"\nvalidation loss {run.first_eval_loss:.3f} -> {run.best_eval_loss:.3f}, {fall:.0%} lower, best at step {run.best_step}"
    )
    assert fall >= 0.30


def test_the_house_style_is_learned(answers, say):
    before, after = (
        sum(follows_house_style(row[when]) for row in answers) / len(answers) for when in ("before", "after")
    )
    say(f"house style on {len(answers)} held-out letters: {before:.0%} before, {after:.0%} after")
    assert len(answers) >= 40
    assert before < 0.10 and after >= 0.80


def test_the_prompts_were_never_trained_on(run, answers, root):
    from helpers.data import load_examples, split

    training, validation = split(
        load_examples(root / run.settings["data"]), run.settings["validation_share"], run.settings["seed"]
    )
    trained_on = {example["prompt"][0]["content"] for example in training}
    assert not trained_on & {row["prompt"] for row in answers}
    assert len(validation) / (len(training) + len(validation)) == pytest.approx(0.15, abs=0.01)


def test_history_has_one_object_per_event_with_trls_names(run):
    assert run.history[0]["step"] == 0 and "eval_loss" in run.history[0]
    assert len(run.evaluations) >= 3 and [
        event for event in run.history if {"loss", "learning_rate", "grad_norm"} <= set(event)
    ]
    steps = [event["step"] for event in run.history]
    assert steps == sorted(steps)


def test_everything_to_keep_is_there(folder):
    for name in (
        "adapter/adapter_model.safetensors",
        "adapter/tokenizer.json",
        "adapter/loss.png",
        "loss.png",
        "report.html",
    ):
        assert (folder / name).stat().st_size > 500, name
    report = (folder / "report.html").read_text(encoding="utf-8")
    assert "data:image/png;base64" in report and "BEFORE" in report and "AFTER" in report and "Linear4bit" in report


def test_the_adapter_names_the_model_and_not_this_machine(folder):
    settings = json.loads((folder / "adapter/adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_plan_split_tokens_and_losses_are_those_that_were_recorded(folder, say):
    wanted, found = json.loads(RECORD.read_text(encoding="utf-8")), golden(folder)
    assert {name: found[name] for name in ("plan", "split", "token_ids")} == {
        name: wanted[name] for name in ("plan", "split", "token_ids")
    }
    within = EXACT if found["cpu"] == wanted["cpu"] else LOOSE
    for kind in ("loss", "eval_loss"):
        apart = max(abs(one / other - 1) for (_, one), (_, other) in zip(found[kind], wanted[kind], strict=True))
        say(f"{kind}: {len(found[kind])} values at most {apart:.1e} from the recorded ones ({found['cpu']})")
        assert apart <= within

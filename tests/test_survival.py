"""A run that is killed, stopped, moved or starved of disk goes on as if nothing had happened."""

import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import make_job
from safetensors.torch import load_file

import helpers.train as training
from helpers import checkpoints
from helpers.callbacks import TrainingStopped
from helpers.checkpoints import complete_checkpoints, latest_complete
from helpers.export import merge
from helpers.runs import Run, has_adapter
from helpers.train import build_trainer, train
from helpers.trainer import OOMSafeTrainer

pytestmark = pytest.mark.slow

ROWS = [{"instruction": f"What is {n} plus {n}?", "output": f"The sum is {2 * n}."} for n in range(40)]
SETTINGS = {
    "max_steps": 24,
    "num_evaluations": 12,
    "lora_dropout": 0.1,
    "effective_batch_size": 4,
    "micro_batch_size": 2,
}


remove_tree = shutil.rmtree


def same(one, other) -> bool:
    if torch.is_tensor(one):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool((one == other).all()) if hasattr(one, "all") else one == other


def rows_of(run: Run) -> list[dict]:
    """History without what depends on the clock."""
    timed = re.compile("seconds|peak_bytes|runtime|per_second|train_loss")
    rows = [{key: value for key, value in event.items() if not timed.search(key)} for event in run.history]
    return [row for row in rows if set(row) - {"step", "epoch", "total_flos", "num_tokens"}]


# ----------------------------------------------------------------------------------------------- the stop button


def press_at(monkeypatch, steps: dict[int, int]) -> None:
    """Interrupt this process while it computes the given steps, as the notebook's stop button does."""
    original = OOMSafeTrainer.training_step

    def pressed(self, *args, **kwargs):
        for _ in range(steps.pop(self.state.global_step + 1, 0)):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(OOMSafeTrainer, "training_step", pressed)


@pytest.mark.parametrize("step", [3, 4])
def test_stop_once_finishes_the_step_and_returns_a_usable_run(job, tmp_path, monkeypatch, capsys, step):
    """At an evaluation (each second step) and between two."""
    press_at(monkeypatch, {step: 1})
    run = train(**job, root=tmp_path)
    assert not run.finished and run.evaluations[-1][0] == step and run.model is not None
    assert (run.adapter / "adapter_model.safetensors").is_file() and run.best_step in (2, step)
    said = capsys.readouterr().out
    assert f"Stopped after step {step}" in said and f"the best step so far ({run.best_step}) is kept" in said
    # What was said to be kept is what lies there: the adapter of that very step, and a checkpoint of the last one.
    kept = load_file(run.adapter / "adapter_model.safetensors")
    best = load_file(run.folder / f"checkpoints/checkpoint-{run.best_step}/adapter_model.safetensors")
    assert same(kept, best) and latest_complete(run.folder).name == f"checkpoint-{step}"
    assert [event["step"] for event in run.history if "loss" in event][-1] == step
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    run = train(**job, root=tmp_path)
    assert run.finished and run.folder == tmp_path / "tiny" and run.evaluations[-1][0] == 7
    steps = [event["step"] for event in run.history if "loss" in event]
    assert steps == sorted(set(steps))
    assert "Continuing" in capsys.readouterr().out


def test_stop_twice_stops_now_and_the_last_whole_checkpoint_stands(job, tmp_path, monkeypatch, capsys):
    press_at(monkeypatch, {5: 2})
    with pytest.raises(KeyboardInterrupt):
        train(**job, root=tmp_path)
    assert "Stopped at once. The checkpoint of step 4" in capsys.readouterr().out
    assert latest_complete(tmp_path / "tiny").name == "checkpoint-4"
    assert train(**job, root=tmp_path).finished


# ----------------------------------------------------------------------------------------------- another machine, other settings


def interrupted(job, root, monkeypatch, step=5, **more) -> Run:
    with monkeypatch.context() as patch:
        press_at(patch, {step: 2})
        with pytest.raises(KeyboardInterrupt):
            train(**job, root=root, **more)
    return Run.load(root / job["config"].name)


def test_a_run_goes_on_on_another_machine_from_its_copy(job, tmp_path, monkeypatch, capsys):
    undisturbed = train(**job, root=tmp_path / "undisturbed")
    drive = tmp_path / "drive"
    interrupted(job, tmp_path / "old machine", monkeypatch, copy_to=drive)
    shutil.rmtree(tmp_path / "old machine")
    run = train(**job, root=tmp_path / "new machine", copy_to=drive)
    assert "Continuing" in capsys.readouterr().out
    assert run.finished and run.evaluations == undisturbed.evaluations
    assert Run.load(drive / "tiny").finished and (drive / "tiny" / "adapter" / "adapter_model.safetensors").is_file()
    assert not (drive / "tiny" / "checkpoints").is_dir() or not complete_checkpoints(drive / "tiny")


def test_a_drive_that_fails_does_not_stop_the_training(job, tmp_path, capsys):
    (tmp_path / "drive").write_text("a file where a folder should be")
    assert train(**job, root=tmp_path / "runs", copy_to=tmp_path / "drive").finished
    assert capsys.readouterr().out.count("[WARN] the copy of this run") == 1


def test_a_moved_run_finds_its_best_checkpoint(job, tmp_path, monkeypatch):
    job["config"].learning_rate, job["config"].max_steps, job["config"].early_stopping_patience = 0.01, 12, 0
    wrong = [{"role": "assistant", "content": "zzzz zzzz zzzz"}]  # what is learned makes validation worse, step by step
    job["training"] = job["training"].map(lambda example: {"completion": wrong})
    interrupted(job, tmp_path / "here", monkeypatch, step=11)
    shutil.move(tmp_path / "here", tmp_path / "there")
    best = load_file(tmp_path / "there" / "tiny" / "checkpoints" / "checkpoint-3" / "adapter_model.safetensors")
    run = train(**job, root=tmp_path / "there")
    assert run.best_step == 3 and same(load_file(run.adapter / "adapter_model.safetensors"), best)


def test_more_steps_are_a_run_of_its_own_and_the_older_one_stays(job, tmp_path):
    run = train(**job, root=tmp_path)
    job["config"].max_steps = 9
    longer = train(**job, root=tmp_path)
    assert longer.folder == tmp_path / "tiny-2" and longer.evaluations[-1][0] == 9
    assert longer.evaluations[0] == run.evaluations[0]  # from the base model, not from what the first one learned
    assert Run.load(run.folder).evaluations == run.evaluations


def test_a_merged_run_is_a_base_model_to_train_further(tiny_model, tmp_path):
    rows = {"alpaca_rows": ROWS, "quantization": "none", "max_steps": 12}
    run = train(**make_job(tiny_model, **rows), root=tmp_path)
    further = train(**make_job(merge(run), **rows, name="further"), root=tmp_path)
    assert further.first_eval_loss == pytest.approx(run.best_eval_loss, rel=0.01)  # merged weights have 16 bits
    assert further.best_eval_loss < run.best_eval_loss


def test_killed_between_the_last_checkpoint_and_the_end_only_the_end_is_done(job, tmp_path, monkeypatch):
    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "save_adapter", killed)
        with pytest.raises(KeyboardInterrupt):
            train(**job, root=tmp_path)
    before = Run.load(tmp_path / "tiny")
    best = load_file(tmp_path / "tiny" / "checkpoints" / f"checkpoint-{before.best_step}" / "adapter_model.safetensors")
    monkeypatch.setattr(OOMSafeTrainer, "training_step", killed)
    run = train(**job, root=tmp_path)
    assert run.finished and run.evaluations == before.evaluations
    assert same(load_file(run.adapter / "adapter_model.safetensors"), best)


def test_a_finished_run_whose_adapter_was_deleted_is_trained_again(job, tmp_path, capsys):
    run = train(**job, root=tmp_path)
    shutil.rmtree(run.adapter)
    again = train(**job, root=tmp_path)
    assert again.finished and (again.adapter / "adapter_model.safetensors").is_file() and again.folder == run.folder
    assert "its adapter is gone" in capsys.readouterr().out


@pytest.mark.parametrize("harm", ['{"identity": ', "[]", '{"identity": 1, "settings": {}, "finished": true}', ""])
def test_an_unreadable_run_goes_on_from_the_copy_in_its_checkpoint_or_is_left_alone(
    job, tmp_path, monkeypatch, capsys, harm
):
    record = interrupted(job, tmp_path, monkeypatch).folder / "run.json"
    record.write_text(harm) if harm else record.unlink()
    run = train(**job, root=tmp_path)
    assert run.finished and run.folder == tmp_path / "tiny" and "Continuing" in capsys.readouterr().out
    record.write_text(harm)  # of a finished run, which has no checkpoints any more
    assert train(**job, root=tmp_path).folder == tmp_path / "tiny-2"
    assert "is left alone" in capsys.readouterr().out and record.read_text() == harm


def test_a_harmed_history_or_adapter_costs_no_run(job, tmp_path, capsys):
    run = train(**job, root=tmp_path)
    lines = (run.folder / "history.jsonl").read_bytes().splitlines(keepends=True)
    (run.folder / "history.jsonl").write_bytes(b"".join([b"\xff{", *lines[:2], b"[]\n5\n", *lines[2:], b'{"st']))
    found = train(**job, root=tmp_path)
    assert found.folder == run.folder and found.history == run.history[1:]  # of the first line, the beginning is gone
    weights = run.adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(FileNotFoundError, match="No whole adapter"):
        merge(run)
    again = train(**job, root=tmp_path)
    assert again.folder == run.folder and again.evaluations == run.evaluations and has_adapter(run.adapter)
    assert "gone or damaged" in capsys.readouterr().out


def test_a_checkpoint_that_cannot_be_read_once_is_kept(job, tmp_path, monkeypatch, capsys):
    run, read = interrupted(job, tmp_path, monkeypatch), checkpoints._size_and_sha256
    whole = [folder.name for folder in complete_checkpoints(run.folder)]
    for error in (OSError(5, "Input/output error"), PermissionError(13, "Permission denied")):
        monkeypatch.setattr(checkpoints, "_size_and_sha256", lambda file, error=error: (_ for _ in ()).throw(error))
        with pytest.raises(
            TrainingStopped, match=f"cannot be read or written now .*{error.strerror}.*left as they are"
        ):
            train(**job, root=tmp_path)
        assert [folder.name for folder in complete_checkpoints(run.folder)] == whole
    monkeypatch.setattr(checkpoints, "_size_and_sha256", read)
    assert train(**job, root=tmp_path).finished and "from step 4" in capsys.readouterr().out


def test_a_finished_run_is_written_down_before_its_checkpoints_go(job, tmp_path, monkeypatch):
    def killed(folder, **kwargs):
        if str(folder).endswith("checkpoints"):
            raise KeyboardInterrupt
        remove_tree(folder, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        train(**job, root=tmp_path)
    monkeypatch.undo()
    run = Run.load(tmp_path / "tiny")
    assert run.finished and complete_checkpoints(run.folder)
    again = train(**job, root=tmp_path, copy_to=tmp_path / "drive")
    assert again.history == run.history and not (run.folder / "checkpoints").exists()
    assert Run.load(tmp_path / "drive" / "tiny").finished, "what was left to do includes the copy"


def test_a_name_with_dollars_and_brackets_is_drawn_mirrored_and_found(
    tiny_model, alpaca_rows, tmp_path, monkeypatch, capsys
):
    job = make_job(tiny_model, alpaca_rows, name="exp[r16] a$b_{$c")
    run = train(**job, root=tmp_path / "one", copy_to=tmp_path / "drive")
    assert run.finished and (run.adapter / "loss.png").is_file()
    found = train(**job, root=tmp_path / "two", copy_to=tmp_path / "drive")
    assert found.history == run.history and "already holds" in capsys.readouterr().out
    monkeypatch.setattr("helpers.models.loss_chart", lambda *args, **kwargs: 1 / 0)
    anew = train(**job, root=tmp_path / "one", restart=True)
    assert anew.finished and not (anew.adapter / "loss.png").exists()
    assert "[WARN] a chart could not be drawn (ZeroDivisionError" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------- early stopping, disk


def test_early_stopping_on_a_planted_overfit(tiny_model, tmp_path, say):
    from helpers.diagnosis import diagnose

    chance = random.Random(0)
    rows = [{"instruction": f"Riddle {n}", "output": "".join(chance.choices("abcdefgh", k=4))} for n in range(27)]
    by_heart = {"r": 32, "lora_alpha": 64, "learning_rate": 1e-2, "quantization": "none", "num_evaluations": 30}
    long = {"effective_batch_size": 10, "max_steps": -1, "num_train_epochs": 30, "early_stopping_patience": 5}
    job = make_job(tiny_model, rows, **by_heart, **long)
    assert len(job["training"]) == 20
    run = train(**job, root=tmp_path)
    last = run.evaluations[-1][0]
    say(f"planted overfit: best at step {run.best_step}, stopped at {last} of 60; {diagnose(run.history)}")
    assert run.finished and run.best_step < last < 60
    assert diagnose(run.history).kind == "overfitting" and f"since step {run.best_step}" in str(diagnose(run.history))

    trainer = build_trainer(**job, output_dir=tmp_path)
    trainer.model.load_adapter(str(run.adapter), "default")  # the best step's
    assert trainer.evaluate()["eval_loss"] == pytest.approx(run.best_eval_loss, abs=1e-5)


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 19776 vs 19664"),  # PyTorch's writer
        Exception("No space left on device (os error 28)"),  # tokenizers
    ],
)
def test_a_full_disk_is_named_and_the_last_good_checkpoint_stands(job, tmp_path, monkeypatch, error):
    original = torch.save

    def full(thing, file, *args, **kwargs):
        if "checkpoint-4" in str(file) and str(file).endswith("optimizer.pt"):
            Path(file).write_bytes(b"half")
            raise error
        return original(thing, file, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(TrainingStopped, match=r"The disk is full.*delete_runs.*checkpoint of step 2"):
        train(**job, root=tmp_path)
    assert [path.name for path in (tmp_path / "tiny" / "checkpoints").glob("checkpoint-*")] == ["checkpoint-2"]
    monkeypatch.undo()
    assert train(**job, root=tmp_path).finished

"""A checkpoint is complete or does not count, older ones go, and a run can move."""

import json
import shutil
from pathlib import Path

import pytest

from helpers import checkpoints
from helpers.checkpoints import MANIFEST, backup, complete_checkpoints, keep, latest_complete, mark_complete


def write(run: Path, step: int, complete: bool = True) -> Path:
    folder = run / "checkpoints" / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_bytes(bytes([step]) * 1000)
    (folder / "training_args.bin").write_bytes(b"pickle")
    state = {"global_step": step, "best_global_step": 2, "best_model_checkpoint": "/somewhere/else/checkpoint-2"}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    if complete:
        mark_complete(folder)
    return folder


def steps_of(run: Path) -> list[int]:
    return [checkpoints.checkpoint_step(folder) for folder in complete_checkpoints(run)]


def test_without_its_manifest_a_checkpoint_does_not_count(tmp_path):
    assert latest_complete(tmp_path) is None
    write(tmp_path, 2)
    write(tmp_path, 4, complete=False)
    assert latest_complete(tmp_path).name == "checkpoint-2"


@pytest.mark.parametrize("harm", ["truncate", "change", "delete", "manifest"])
def test_harm_of_any_kind_makes_the_older_one_count(tmp_path, harm):
    write(tmp_path, 2)
    file = write(tmp_path, 4) / "adapter_model.safetensors"
    if harm == "truncate":
        file.write_bytes(file.read_bytes()[:-1])
    elif harm == "change":
        file.write_bytes(b"x" + file.read_bytes()[1:])
    elif harm == "delete":
        file.unlink()
    else:
        (file.parent / MANIFEST).write_text('{"adapter_model.safetensors": [10')
    assert latest_complete(tmp_path).name == "checkpoint-2"


def test_a_complete_checkpoint_holds_no_pickle_and_no_path(tmp_path):
    folder = write(tmp_path, 2)
    assert not (folder / "training_args.bin").exists()
    assert "somewhere" not in "".join(file.read_text(errors="ignore") for file in folder.iterdir())
    assert json.loads((folder / "trainer_state.json").read_text())["best_global_step"] == 2


def test_the_last_two_and_the_best_stay(tmp_path):
    for step in range(1, 7):
        write(tmp_path, step)
        keep(tmp_path, best_step=min(step, 2))
    assert steps_of(tmp_path) == [2, 5, 6]


def test_a_half_written_one_never_pushes_out_a_complete_one(tmp_path):
    write(tmp_path, 2)
    for step in (4, 6, 8):
        write(tmp_path, step, complete=False)
    keep(tmp_path, best_step=2)
    assert steps_of(tmp_path) == [2]
    write(tmp_path, 10, complete=False)
    checkpoints.drop_incomplete(tmp_path)
    assert [folder.name for folder in (tmp_path / "checkpoints").iterdir()] == ["checkpoint-2"]


def test_the_second_place_holds_the_same_run_and_brings_it_back(tmp_path):
    here, there, new = tmp_path / "here", tmp_path / "drive" / "run", tmp_path / "new"
    for step in (2, 4, 6):
        write(here, step)
        keep(here, best_step=2, last=1)
        (here / "history.jsonl").write_text(f'{{"step": {step}}}\n')
        (here / "run.json").write_text("{}")
        backup(here, there)
    assert steps_of(there) == [2, 6] and len(list((there / "checkpoints").iterdir())) == 2
    assert (there / "history.jsonl").read_text() == '{"step": 6}\n' and not list(there.rglob("*.part"))
    shutil.rmtree(here)
    backup(there, new)
    assert latest_complete(new).name == "checkpoint-6" and (new / "run.json").is_file()
    assert checkpoints.best_checkpoint(new, 2).parent == new / "checkpoints"


def test_a_copy_that_breaks_off_is_not_taken_for_a_checkpoint(tmp_path, monkeypatch):
    here, there = tmp_path / "here", tmp_path / "there"
    write(here, 2)

    def broken(source, target, **settings):
        shutil.copyfile(source / MANIFEST, target / MANIFEST)
        raise OSError("Drive went away")

    monkeypatch.setattr(shutil, "copytree", broken)
    with pytest.raises(OSError, match="Drive went away"):
        backup(here, there)
    assert latest_complete(there) is None and latest_complete(here).name == "checkpoint-2"

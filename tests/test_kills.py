"""A run that is killed inside a write, has no rights, no room, or a rival: nothing that looks whole is not, and nothing is lost.

`pytest --attack tests/test_kills.py` kills 20 times where CI kills 3 times.
"""

import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from conftest import make_job
from safetensors.torch import load_file
from test_survival import ROWS, SETTINGS, interrupted, logged, processes, rows_of, same, wait_for  # noqa: F401
from transformers import TrainerCallback

import helpers.train as training
from helpers import checkpoints
from helpers.callbacks import TrainingStopped
from helpers.runs import Run, has_adapter
from helpers.train import train
from helpers.trainer import OOMSafeTrainer

pytestmark = pytest.mark.slow

WRITES = {"checkpoint": (OOMSafeTrainer, "_save_checkpoint"), "adapter": (training, "save_adapter")}
LONGEST = 0.06  # seconds that a write of the tiny model takes on a slow disk: kills are at random moments of it


def train_and_be_killed(tiny_model: Path, root: Path, write: str, after: float | None) -> None:
    """The target of a child process: it kills itself so many seconds after a write has begun."""
    owner, name = WRITES[write]
    original = getattr(owner, name)

    def killed(*args, **kwargs):
        threading.Timer(after, os.kill, (os.getpid(), signal.SIGKILL)).start()
        result = original(*args, **kwargs)
        threading.Event().wait()  # the write was quicker: the kill comes right behind it
        return result

    if after is not None:
        setattr(owner, name, killed)
    training.LiveChart = lambda *args: TrainerCallback()  # which would take most of the time
    torch.set_num_threads(1)
    train(**make_job(tiny_model, ROWS, **SETTINGS), root=root)


def check_what_looks_whole(folder: Path) -> None:
    run = Run.load(folder)
    for checkpoint in checkpoints.complete_checkpoints(folder):
        assert checkpoints.is_complete(checkpoint), checkpoint
    if run.adapter.is_dir():
        assert has_adapter(run.adapter) and (run.adapter / "tokenizer.json").is_file()
        assert (run.adapter / "loss.png").read_bytes().endswith(b"IEND\xaeB`\x82")
    assert not run.finished or run.adapter.is_dir()


@pytest.mark.parametrize("write", WRITES)
def test_kills_inside_a_write_lose_nothing(tiny_model, tmp_path, processes, attacks, say, write):  # noqa: F811
    chance, folder, inside, latest = random.Random(write), tmp_path / "tiny", 0, 0
    for _ in range(attacks):
        arguments = (tiny_model, tmp_path, write, chance.uniform(0, LONGEST))
        child = processes.Process(target=train_and_be_killed, args=arguments)
        child.start()
        child.join(120)
        assert child.exitcode == -signal.SIGKILL
        check_what_looks_whole(folder)
        inside += any(folder.glob("*.part")) or len(list(folder.glob("checkpoints/*"))) > len(
            checkpoints.complete_checkpoints(folder)
        )
        last = checkpoints.latest_complete(folder)
        assert last is None or checkpoints.checkpoint_step(last) >= latest
        latest = checkpoints.checkpoint_step(last) if last else 0
    for root in (tmp_path, tmp_path / "undisturbed"):
        child = processes.Process(target=train_and_be_killed, args=(tiny_model, root, write, None))
        child.start()
        child.join(240)
        assert child.exitcode == 0
    one, other = Run.load(folder), Run.load(tmp_path / "undisturbed" / "tiny")
    say(
        f"{attacks} kills from 0 to {1000 * LONGEST:.0f} ms after the begin of a write ({write}), {inside} of them inside"
    )
    assert one.finished and not list(folder.glob("*.part")) and rows_of(one) == rows_of(other)
    assert same(*(load_file(run.adapter / "adapter_model.safetensors") for run in (one, other)))


def test_of_two_processes_on_one_run_the_second_gets_a_sentence(tiny_model, tmp_path, processes, job):  # noqa: F811
    from test_survival import train_in_a_process

    child = processes.Process(target=train_in_a_process, args=(tiny_model, tmp_path, 0.1))
    child.start()
    wait_for(lambda: logged(tmp_path / "tiny") > 2, child)
    with pytest.raises(TrainingStopped, match=r"Another process trains a run in .*tiny now: wait for it, or give"):
        train(**job, root=tmp_path)
    child.join(240)
    steps = [event["step"] for event in Run.load(tmp_path / "tiny").history if "loss" in event]
    assert child.exitcode == 0 and steps == sorted(set(steps))
    assert train(**job, root=tmp_path).finished, "a lock ends with its process"


@pytest.mark.skipif(os.name != "posix", reason="Windows has other rights")
def test_a_folder_that_may_not_be_written_is_a_sentence_and_the_run_goes_on_when_it_may(job, tmp_path, monkeypatch):
    run, root = interrupted(job, tmp_path, monkeypatch), os.getuid() == 0
    places = [path for path in (run.folder, *run.folder.rglob("*")) if path.is_dir()]
    for place in places:
        place.chmod(0o555)
    for above in list(tmp_path.parents)[:3] if root else ():  # pytest's own folders are for their owner only
        above.chmod(0o755)
    os.seteuid(65534 if root else os.getuid())  # nobody: root may write anywhere
    try:
        for folder in (tmp_path, Path(tmp_path.anchor) / "not-ours"):
            with pytest.raises(
                TrainingStopped, match=r"cannot be read or written now .*Permission.*name another folder"
            ):
                train(**job, root=folder)
    finally:
        os.seteuid(os.getuid())
    for place in places:
        place.chmod(0o755)
    assert train(**job, root=tmp_path).folder == run.folder


@pytest.fixture
def small_disk(tmp_path):
    """A function that mounts a disk of so many KiB, or makes it as large: only Linux's root may."""

    def mount(kib: int) -> Path:
        remount = "remount," * os.path.ismount(tmp_path)
        command = ["mount", "-t", "tmpfs", "-o", f"{remount}size={kib}k", "tmpfs", str(tmp_path)]
        if sys.platform != "linux" or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("no right to mount a small disk")
        return tmp_path

    yield mount
    if os.path.ismount(tmp_path):
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_disk_that_is_full_at_any_stage_is_a_sentence_and_the_run_goes_on_with_more(job, small_disk, say):
    kib, stops = 0, []
    while True:
        kib += 4 if kib < 24 else 40
        disk = small_disk(kib)
        try:
            run = train(**job, root=disk)
            break
        except TrainingStopped as error:
            assert "The disk is full" in str(error) and "delete_runs" in str(error)
            stops.append(logged(disk / "tiny"))
            if (disk / "tiny" / "run.json").exists():
                check_what_looks_whole(disk / "tiny")
    say(f"full on disks of 4 to {kib - 40} KiB, with {', '.join(map(str, stops))} rows of history; whole on {kib} KiB")
    steps = [event["step"] for event in run.history if "loss" in event]
    assert run.finished and run.folder == disk / "tiny" and steps == list(range(1, 8)) and len(set(stops)) > 3

"""A run that is killed inside a write, has no rights, no room, or a rival: nothing that looks whole is not, and nothing is lost.

`make attack` kills 20 times where CI kills 3 times.
"""

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import make_job
from safetensors.torch import load_file
from test_survival import ROWS, SETTINGS, interrupted, rows_of, same
from transformers import TrainerCallback

import helpers.models
import helpers.train as training
from helpers import checkpoints
from helpers.callbacks import TrainingStopped
from helpers.runs import Run, has_adapter
from helpers.train import train
from helpers.trainer import OOMSafeTrainer

pytestmark = pytest.mark.slow

# What is killed at a random moment after it has begun: the training anywhere, or one kind of write, and seconds that this may take.
MOMENTS = {
    "training": (OOMSafeTrainer, "training_step", 1.0),
    "checkpoint": (OOMSafeTrainer, "_save_checkpoint", 0.06),
    "adapter": (helpers.models, "atomic_folder", 0.03),
}


def train_in_a_process(tiny_model: Path, root: Path, slow: float = 0.0, moment: str = "", after: float = 0.0) -> None:
    """The target of a child process: the whole job, each step a little longer, and checkpoints stay to be compared."""

    class Slow(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            time.sleep(slow)

    def remove(folder, **kwargs):
        if not str(folder).endswith("checkpoints"):
            remove_tree(folder, **kwargs)

    def begun(*args, **kwargs):
        if not any(isinstance(thread, threading.Timer) for thread in threading.enumerate()):
            threading.Timer(after, os.kill, (os.getpid(), signal.SIGKILL)).start()
        result = original(*args, **kwargs)
        if moment == "checkpoint":
            threading.Event().wait()  # the write was quicker: the kill comes right behind it
        return result

    training.LiveChart, shutil.rmtree = lambda *args: Slow(), remove
    if moment:
        owner, name, _ = MOMENTS[moment]
        original = getattr(owner, name)
        setattr(owner, name, begun)
    torch.set_num_threads(1)
    train(**make_job(tiny_model, ROWS, **SETTINGS), root=root)


remove_tree = shutil.rmtree


@pytest.fixture(scope="module")
def processes():
    """A server that has imported everything once and forks a child for each run."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["helpers.train", "bitsandbytes", "conftest"])
    return context


def tensors_of(checkpoint: Path) -> dict:
    """Everything in a checkpoint that decides how training goes on."""
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    return {
        "adapter": load_file(checkpoint / "adapter_model.safetensors"),
        "optimizer": torch.load(checkpoint / "optimizer.pt", weights_only=True),
        "scheduler": torch.load(checkpoint / "scheduler.pt", weights_only=True),
        "random numbers": torch.load(
            checkpoint / "rng_state.pth", weights_only=False
        ),  # ours, with numpy's state in it
        "patience": state["stateful_callbacks"]["EarlyStoppingCallback"],
        "best": (state["best_global_step"], state["best_metric"]),
        "step": state["global_step"],
    }


def logged(folder: Path) -> int:
    file = folder / "history.jsonl"
    return len(file.read_text().splitlines()) if file.is_file() else 0


def wait_for(event, child) -> None:
    began = time.monotonic()
    while child.is_alive() and not event() and time.monotonic() - began < 60:
        time.sleep(0.001)


def check_what_looks_whole(folder: Path) -> None:
    run = Run.load(folder)
    for checkpoint in checkpoints.complete_checkpoints(folder):
        assert checkpoints.is_complete(checkpoint), checkpoint
    if run.adapter.is_dir():
        assert has_adapter(run.adapter) and (run.adapter / "tokenizer.json").is_file()
        assert (run.adapter / "loss.png").read_bytes().endswith(b"IEND\xaeB`\x82")
    assert not run.finished or run.adapter.is_dir()


@pytest.mark.parametrize("moment", MOMENTS)
def test_kills_lose_nothing_and_change_nothing(tiny_model, tmp_path, processes, attacks, say, moment):
    def exit_code(root: Path, *how) -> int:
        child = processes.Process(target=train_in_a_process, args=(tiny_model, root, *how))
        child.start()
        child.join(240)
        return child.exitcode

    chance, folder, longest, inside, latest = random.Random(moment), tmp_path / "tiny", MOMENTS[moment][2], 0, 0
    for _ in range(attacks):
        if (
            exit_code(tmp_path, 0.05, moment, chance.uniform(0, longest)) == 0
        ):  # nothing was left to kill: from the beginning
            shutil.rmtree(folder)
            latest = 0
            continue
        check_what_looks_whole(folder)
        whole = checkpoints.complete_checkpoints(folder)
        inside += any(folder.glob("*.part")) or len(whole) < len(list(folder.glob("checkpoints/checkpoint-*")))
        assert not whole or checkpoints.checkpoint_step(whole[-1]) >= latest
        latest = checkpoints.checkpoint_step(whole[-1]) if whole else 0
    assert [exit_code(root) for root in (tmp_path, tmp_path / "undisturbed")] == [0, 0]
    one, other = Run.load(folder), Run.load(tmp_path / "undisturbed" / "tiny")
    say(f"{attacks} kills within {1000 * longest:.0f} ms of {moment}, {inside} of them left half a write")
    assert one.finished and not list(folder.glob("*.part")) and rows_of(one) == rows_of(other)
    assert same(*(load_file(run.adapter / "adapter_model.safetensors") for run in (one, other)))
    found, expected = (tensors_of(checkpoints.latest_complete(run.folder)) for run in (one, other))
    assert [name for name in expected if not same(expected[name], found[name])] == [] and expected["step"] == 24


def test_of_two_processes_on_one_run_the_second_gets_a_sentence(tiny_model, tmp_path, processes, job):
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

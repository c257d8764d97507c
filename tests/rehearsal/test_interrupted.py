"""What interrupts a T4's training: its memory, a kill, and another card tomorrow. With fp16's gradient scaler, as on the card."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from card import Witness, card_plan, pretend_card
from conftest import make_job
from safetensors.torch import load_file
from test_survival import interrupted, rows_of
from test_trainer import UNEVEN, losses_of, run_out_once
from trl import SFTTrainer

from helpers import train as training
from helpers.checkpoints import latest_complete
from helpers.models import load_quantized
from helpers.runs import Run

pytestmark = pytest.mark.slow
SETTINGS = {"max_length": 256, "max_steps": 6, "num_evaluations": 6, "effective_batch_size": 8, "micro_batch_size": 4}
SCALE = 2.0**10  # small enough that no step is skipped, so that all runs see the same steps


def job_on(card: str, dtype: str, tiny_model: Path, **settings: Any) -> dict[str, Any]:
    """A job as `card` would train it: "cpu" in fp32 with 32-bit AdamW, others in `dtype` with 8-bit AdamW."""
    job = make_job(tiny_model, UNEVEN, **SETTINGS | settings)
    if card != "cpu":
        job["plan"] = card_plan(job["plan"], dtype)
        job["plan"] = replace(job["plan"], gpu=replace(job["plan"].gpu, name=card))
    job["model"], job["tokenizer"] = load_quantized(job["config"], job["plan"])
    return job


@pytest.fixture(scope="module")
def undisturbed(tiny_model, tmp_path_factory) -> Run:
    """A T4's run to its end."""
    with pytest.MonkeyPatch.context() as patch:
        pretend_card(patch, SCALE)
        return training.train(
            **job_on("Tesla T4", "float16", tiny_model, name="undisturbed"), root=tmp_path_factory.mktemp("runs")
        )


@pytest.mark.parametrize(
    ("place", "owner", "name", "call"),
    [
        ("forward", SFTTrainer, "compute_loss", 8),
        ("backward", torch.Tensor, "backward", 2),
        ("a later backward", torch.Tensor, "backward", 6),
    ],
)
def test_running_out_of_memory_under_the_scaler_changes_nothing(
    tiny_model, tmp_path, monkeypatch, capsys, undisturbed, say, place, owner, name, call
):
    job, witness = job_on("Tesla T4", "float16", tiny_model), pretend_card(monkeypatch, SCALE)
    run_out_once(monkeypatch, owner, name, call)
    run = training.train(**job, root=tmp_path)
    assert "Out of memory" in capsys.readouterr().out and run.plan["micro_batch"] == 2
    worst = max(abs(a - b) for a, b in zip(losses_of(run), losses_of(undisturbed), strict=True))
    say(f"out of memory in {place} under the scaler: losses at most {worst:.1e} from the undisturbed run's")
    assert (
        run.finished and witness.skipped == 0 and worst < 2e-3
    )  # fp16 has 11 bits: sums in another order differ by so much


def train_as_a_t4(tiny_model: Path, root: Path) -> None:
    """The target of a child process, which is killed while it runs; each step takes a little longer."""
    patch = pytest.MonkeyPatch()
    pretend_card(patch, SCALE)
    patch.setattr(Witness, "on_step_begin", lambda *args, **kwargs: time.sleep(0.3))
    torch.set_num_threads(1)
    training.train(**job_on("Tesla T4", "float16", tiny_model, name="undisturbed"), root=root)


def test_a_kill_under_the_scaler_changes_nothing(tiny_model, tmp_path, monkeypatch, undisturbed):
    child = multiprocessing.get_context("spawn").Process(target=train_as_a_t4, args=(tiny_model, tmp_path))
    child.start()
    folder, began = tmp_path / "undisturbed", time.monotonic()
    while (
        child.is_alive()
        and time.monotonic() - began < 240
        and not (folder / "checkpoints/checkpoint-3/manifest.json").exists()
    ):
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    last = latest_complete(folder)
    scaler = torch.load(last / "scaler.pt", weights_only=True)
    assert 3 <= int(last.name[-1]) < 6 and scaler["scale"] == SCALE and scaler["_growth_tracker"] == int(last.name[-1])

    witness = pretend_card(monkeypatch, 2.0)  # another start than the one that the checkpoint holds
    run = training.train(**job_on("Tesla T4", "float16", tiny_model, name="undisturbed"), root=tmp_path)
    assert run.finished and witness.trainer.accelerator.scaler.get_scale() == SCALE
    assert rows_of(run) == rows_of(undisturbed)
    one, other = (load_file(r.adapter / "adapter_model.safetensors") for r in (run, undisturbed))
    assert all(torch.equal(one[name], other[name]) for name in one)


JOURNEYS = [
    [("Tesla T4", "float16"), ("NVIDIA L4", "bfloat16"), ("Tesla T4", "float16")],
    [("Tesla T4", "float16"), ("cpu", "float32"), ("Tesla T4", "float16")],
    [("cpu", "float32"), ("NVIDIA L4", "bfloat16"), ("cpu", "float32")],
]


@pytest.mark.parametrize("journey", JOURNEYS, ids=lambda journey: " -> ".join(card for card, _ in journey))
def test_a_run_goes_on_on_another_kind_of_card_and_back(tiny_model, tmp_path, monkeypatch, undisturbed, say, journey):
    """The optimizer stays the run's; what a card does not have (a gradient scaler) is left out; the curve goes on."""
    pretend_card(monkeypatch, SCALE)
    for (card, dtype), stop_at in zip(journey, (3, 5, None)):
        job = job_on(card, dtype, tiny_model)
        if stop_at:
            run = interrupted(job, tmp_path, monkeypatch, step=stop_at)
        else:
            run = training.train(**job, root=tmp_path)
    assert run.finished and [path.name for path in tmp_path.iterdir()] == ["tiny"]
    assert run.plan["optimizer"] == ("adamw_torch" if journey[0][0] == "cpu" else "adamw_8bit")
    steps = [event["step"] for event in run.history if "loss" in event]
    assert steps == sorted(set(steps)) and steps[-1] == 6
    worst = max(abs(a / b - 1) for (_, a), (_, b) in zip(run.evaluations, undisturbed.evaluations, strict=True))
    say(f"{' -> '.join(card for card, _ in journey)}: validation losses at most {worst:.2%} from a T4's alone")
    assert worst < 0.02


def test_a_checkpoint_of_a_card_without_a_scaler_holds_none(tiny_model, tmp_path, monkeypatch):
    pretend_card(monkeypatch)
    interrupted(job_on("NVIDIA L4", "bfloat16", tiny_model), tmp_path, monkeypatch, step=3)
    assert not (latest_complete(tmp_path / "tiny") / "scaler.pt").exists()
    assert json.loads((tmp_path / "tiny" / "run.json").read_text())["plan"]["dtype"] == "bfloat16"

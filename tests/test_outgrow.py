"""The exported script on two processes: replicated and sharded, on CPUs with gloo, where the same code runs as on two GPUs."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.utils import FullyShardedDataParallelPlugin
from conftest import make_job

from helpers.config import ConfigError
from helpers.export import export_plan, export_script
from helpers.export.script import accelerate_config
from helpers.hardware import KNOWN_GPUS
from helpers.planner import make_plan
from helpers.registry import BUNDLED_MODEL
from helpers.runs import read_history
from helpers.train import train
from helpers.weights import fetch_weights

BAR = 1e-3  # largest difference of any loss to one process
STEPS = 6
ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}


@pytest.fixture
def exported(tiny_model, alpaca_rows, tmp_path):
    """A run of six steps on the tiny model, and its script."""
    return make_run(tiny_model, alpaca_rows, tmp_path)


def make_run(model, rows, tmp_path, **settings):
    """22 rows, of which 16 are trained on: four whole steps of four make an epoch."""
    job = make_job(model, rows[:22], max_steps=STEPS, num_evaluations=3, **settings)
    run = train(**job, root=tmp_path / "runs")
    # Else an epoch's last step is filled up, and differs.
    assert len(job["training"]) % job["config"].effective_batch_size == 0
    return run, export_script(run, tmp_path / "export", job["training"], job["validation"])


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def launch(config: str, *command: str, folder: Path) -> subprocess.Popen:
    arguments = ["launch", "--config_file", config, "--main_process_port", str(free_port()), *command]
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", *arguments]
    with (folder / "log.txt").open("w") as log:
        own_group = {"cwd": folder, "env": ENVIRONMENT, "start_new_session": True}
        return subprocess.Popen(command, stdout=log, stderr=log, **own_group)


def finish(process: subprocess.Popen, folder: Path) -> int:
    try:
        return process.wait(300)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            print((folder / "log.txt").read_text()[-3000:])


def losses(events) -> list[tuple[int, str, float]]:
    return [(event["step"], name, event[name]) for event in events for name in ("loss", "eval_loss") if name in event]


def largest_difference(run, folder: Path) -> float:
    ours, theirs = losses(run.history), losses(read_history(folder / "history.jsonl"))
    assert [row[:2] for row in theirs] == [row[:2] for row in ours] and len(ours) >= STEPS + 3
    return max(abs(one[2] - other[2]) for one, other in zip(theirs, ours))


@pytest.mark.slow
def test_two_replicas_of_a_real_model_give_the_losses_of_one_process(alpaca_rows, tmp_path, say):
    run, script = make_run(BUNDLED_MODEL, alpaca_rows, tmp_path, learning_rate=5e-4)
    weights = str(fetch_weights(BUNDLED_MODEL))
    assert finish(launch("replicated.yaml", "train.py", weights, folder=script.parent), script.parent) == 0
    worst = largest_difference(run, script.parent)
    say(f"2 processes (DDP), SmolLM2-135M in NF4 + LoRA: losses of {STEPS} steps differ by {worst:.1e} (bar {BAR})")
    assert worst <= BAR


@pytest.mark.slow
def test_two_shards_give_the_losses_of_one_process_and_hold_half_of_the_weights_each(exported, root, say):
    run, script = exported
    wrapper = root / "tests/outgrow/fsdp_on_cpu.py"
    assert finish(launch("sharded.yaml", str(wrapper), "train.py", folder=script.parent), script.parent) == 0
    worst = largest_difference(run, script.parent)
    parts = [json.loads((script.parent / f"parts-{rank}.json").read_text()) for rank in (0, 1)]
    for name, (whole, first) in parts[0].items():
        assert first + parts[1][name][1] == whole and 0.4 < first / whole < 0.6, name
    assert any("q_proj.base_layer.weight" in name for name in parts[0]), "the 4-bit weights must be among them"
    say(f"2 processes (FSDP2), NF4 cut in two: losses of {STEPS} steps differ by {worst:.1e} (bar {BAR})")
    assert worst <= BAR
    assert (script.parent / "adapter/adapter_model.safetensors").stat().st_size > 10_000


@pytest.mark.slow
def test_one_of_two_is_killed_the_other_ends_too_and_a_restart_goes_on(exported, say):
    run, script = exported
    folder = script.parent
    process = launch("replicated.yaml", "train.py", folder=folder)
    end = time.monotonic() + 240
    while not list(folder.glob("checkpoints/*/trainer_state.json")):
        assert process.poll() is None and time.monotonic() < end, (folder / "log.txt").read_text()[-3000:]
        time.sleep(0.01)
    children = psutil.Process(process.pid).children(recursive=True)
    workers = [child for child in children if "train.py" in " ".join(child.cmdline())]
    workers[-1].kill()
    began = time.monotonic()
    assert finish(process, folder) != 0
    seconds = time.monotonic() - began
    assert not (folder / "history.jsonl").exists(), "killed too late: it had finished"
    assert not [child for child in workers if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    log = (folder / "log.txt").read_text()
    assert "SIGKILL" in log or "exitcode: -9" in log.replace("  ", " ")
    assert finish(launch("replicated.yaml", "train.py", folder=folder), folder) == 0
    worst = largest_difference(run, folder)
    say(f"one of 2 processes killed: all ended after {seconds:.0f} s; the restart's losses differ by {worst:.1e}")
    assert worst <= BAR


@pytest.mark.parametrize("card, precision", [("T4", "fp16"), ("RTX 4060", "bf16")])
@pytest.mark.parametrize("name", ["replicated.yaml", "sharded.yaml"])
def test_the_configs_are_what_accelerate_understands(job, card, precision, name, tmp_path, monkeypatch):
    plan = make_plan(job["config"], KNOWN_GPUS[card], exact=False)
    file = tmp_path / name
    file.write_text(accelerate_config(name, plan, gpus=3))
    config = load_config_from_file(str(file))
    assert isinstance(config, ClusterConfig) and config.num_processes == 3 and config.mixed_precision == precision
    monkeypatch.setenv("FSDP_VERSION", "2")
    known = set(FullyShardedDataParallelPlugin.__dataclass_fields__) | {"fsdp_version", "fsdp_auto_wrap_policy"}
    for setting in yaml.safe_load(file.read_text()).get("fsdp_config", {}):
        assert setting in known or setting.removeprefix("fsdp_") in known


def test_a_plan_for_a_cpu_is_not_mixed(job):
    config = yaml.safe_load(accelerate_config("replicated.yaml", job["plan"], gpus=2))
    assert job["plan"].dtype == "float32" and config["mixed_precision"] == "no"  # and not YAML's false


def test_a_plan_for_two_cards_becomes_a_script_although_nothing_was_run(job, tmp_path):
    job["config"].model = "Llama-3.2-3B-Instruct"
    plan = make_plan(job["config"], KNOWN_GPUS["T4"], exact=False, gpus=2, sharded=True)
    script = export_plan(job["config"], plan, job["training"], job["validation"], tmp_path / "export")
    settings = json.loads((script.parent / "settings.json").read_text())
    assert "planned for 2 x Tesla T4" in settings["about"] and settings["dtype"] == "float16"
    assert yaml.safe_load((script.parent / "sharded.yaml").read_text())["num_processes"] == 2
    with pytest.raises(ConfigError, match=r"for 2 GPUs.*export_plan"):
        train(**job | {"plan": plan}, root=tmp_path / "runs")

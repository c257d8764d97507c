"""The exported script: plain, on its own, and with the run's own losses."""

import ast
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from helpers.export import ExportError, export_script
from helpers.export.script import TEMPLATES, plan_of, script_settings
from helpers.hardware import KNOWN_GPUS
from helpers.planner import make_plan
from helpers.train import train

ROOT = Path(__file__).parent.parent
SCRIPT = (TEMPLATES / "train.py").read_text(encoding="utf-8")
LOSSES = ("loss", "eval_loss", "grad_norm", "learning_rate")
ECOSYSTEM = {"json", "math", "os", "sys", "pathlib", "torch", "trl", "datasets", "peft", "transformers"}


@pytest.fixture
def run(job, tmp_path):
    return train(**job, root=tmp_path)


def losses(events):
    return [(event["step"], name, event[name]) for event in events for name in LOSSES if name in event]


def same(ones, others):
    """The same steps and names, and values that differ by rounding."""
    assert [row[:2] for row in ones] == [row[:2] for row in others]
    return [row[2] for row in ones] == pytest.approx([row[2] for row in others], rel=1e-5)


def start(script, python_path=""):
    """Run it as another process; (its losses, what it printed)."""
    environment = os.environ | {"PYTHONPATH": python_path, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, str(script)], env=environment, check=True, capture_output=True, text=True)
    events = [json.loads(line) for line in (script.parent / "history.jsonl").read_text().splitlines()]
    return losses(events), done.stdout


@pytest.mark.slow
def test_the_script_alone_gives_the_losses_of_the_run(run, job, tmp_path, say):
    """To rounding: its micro-batches are fixed, the run's were cut by tokens."""
    script = export_script(run, tmp_path / "elsewhere", job["training"], job["validation"])
    (theirs, _), ours = start(script), losses(run.history)
    worst = max(abs(one[2] - other[2]) for one, other in zip(theirs, ours))
    say(f"exported script: {len(ours)} losses, norms and rates of the run, largest difference {worst:g}")
    assert same(theirs, ours) and len([row for row in ours if row[1] == "eval_loss"]) >= 3
    assert (script.parent / "adapter/adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_the_script_of_a_selective_plan_trains_selectively(job, tmp_path):
    """TRL's own setting for it stops transformers 5.16 and newer at the first step."""
    job["plan"] = replace(job["plan"], checkpointing="selective")
    run = train(**job, root=tmp_path)
    script = export_script(run, tmp_path / "elsewhere", job["training"], job["validation"])
    look = "from helpers.compat import get_checkpointing\nprint('mode:', get_checkpointing(trainer.model))\n"
    script.write_text(script.read_text() + look)
    theirs, said = start(script, python_path=str(ROOT))
    assert "mode: selective" in said and same(theirs, losses(run.history))


def run_until_torch(settings, folder, monkeypatch, **environment):
    """What the script does before it imports torch; its variables."""
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setattr(os, "environ", environment)
    (folder / "settings.json").write_text(json.dumps(settings))
    names = {"__file__": str(folder / "train.py")}
    exec(compile(SCRIPT.split("import torch\n")[0], "train.py", "exec"), names)
    return names


@pytest.mark.parametrize(
    "card, growing, repeated, precision",
    [("T4", True, True, "fp16"), ("RTX 3060", True, False, "bf16"), ("RTX 3060 on Windows", False, True, "bf16")],
)
def test_the_script_sets_a_card_up_as_the_plan_counts_on_it(
    job, card, growing, repeated, precision, tmp_path, monkeypatch
):
    gpu = replace(KNOWN_GPUS[card.removesuffix(" on Windows")], expandable=True)
    gpu = replace(gpu, flash=False, expandable=False) if card.endswith("Windows") else gpu
    settings = script_settings(job["config"], make_plan(job["config"], gpu, exact=False), 100, "")
    assert settings["repeat_shared_keys"] is repeated and settings["device"] == "cuda"
    assert [name for name in ("fp16", "bf16") if settings["sft"][name]] == [precision]
    run_until_torch(settings, tmp_path, monkeypatch)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0"
    assert os.environ["PYTORCH_ALLOC_CONF"] == f"expandable_segments:{growing}"


def test_a_step_is_shared_equally_among_processes_or_refused(job, tmp_path, monkeypatch):
    settings = script_settings(job["config"], job["plan"], 100, "")
    names = run_until_torch(settings, tmp_path, monkeypatch, WORLD_SIZE="2")
    assert (names["EXAMPLES"], names["MICRO"], names["MODEL"]) == (2, 2, job["plan"].model)
    with pytest.raises(AssertionError, match="4 examples per step cannot be shared equally among 3 processes"):
        run_until_torch(settings, tmp_path, monkeypatch, WORLD_SIZE="3")


def test_it_imports_the_ecosystem_only_and_is_short(say):
    tree = ast.parse(SCRIPT)
    imported = {
        (getattr(node, "module", None) or node.names[0].name).split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
    }
    assert imported == ECOSYSTEM
    statements = sum(isinstance(node, ast.stmt) for node in ast.walk(tree))
    say(f"exported script: {len(SCRIPT.splitlines())} lines, {statements} statements")
    assert statements <= 70 and max(map(len, SCRIPT.splitlines())) <= 132


def test_a_run_and_its_machine_are_said_and_its_versions_pinned(run, job, tmp_path):
    script = export_script(run, tmp_path / "elsewhere", job["training"], job["validation"])
    settings = json.loads((script.parent / "settings.json").read_text())
    result = f"{run.first_eval_loss:.3f} -> {run.best_eval_loss:.3f} at step {run.best_step}, on CPU"
    assert result in settings["about"] and settings["model"] == job["plan"].model
    pinned = (script.parent / "requirements.txt").read_text().splitlines()
    assert len(pinned) == 7 and all("==" in line and "+" not in line for line in pinned)
    assert script.read_text() == SCRIPT and not list(script.parent.glob("*.part"))
    assert len((script.parent / "data/training.jsonl").read_text().splitlines()) == len(job["training"])


def test_an_unfinished_run_and_other_data_are_refused_in_a_sentence(run, job, tmp_path):
    with pytest.raises(ExportError, match=r"SHA-256 differs.*put the old file back"):
        export_script(run, tmp_path / "elsewhere", job["validation"], job["training"])
    run.settings["data"] = "nowhere.jsonl"
    with pytest.raises(ExportError, match=r"cannot be read again.*pass training="):
        export_script(run, tmp_path / "elsewhere")
    run.finished = False
    with pytest.raises(ExportError, match=r"is not finished.*run its train cell again"):
        export_script(run, tmp_path / "elsewhere")
    assert not (tmp_path / "elsewhere").exists()


def test_a_folder_with_something_else_in_it_is_left_alone(run, job, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    with pytest.raises(ExportError, match="holds something else"):
        export_script(run, tmp_path / "mine", job["training"], job["validation"])
    assert (tmp_path / "mine/thesis.txt").read_text() == "years of work"


def test_runs_of_older_versions_recorded_less_and_still_export(run):
    for name in ("device", "seq_len", "training_examples", "validation_examples"):
        run.plan.pop(name)
    plan = plan_of(run)
    assert (plan.gpu.kind, plan.seq_len, plan.micro_batch) == ("cpu", 128, 2)

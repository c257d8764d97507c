"""The exported script: plain, on its own, and with the run's own losses."""

import ast
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from helpers.export import ExportError, export_script
from helpers.export.script import plan_of
from helpers.export.script_text import script_text
from helpers.export.trl_yaml import trl_yaml
from helpers.hardware import KNOWN_GPUS
from helpers.planner import make_plan
from helpers.train import train

ROOT = Path(__file__).parent.parent
LOSSES = ("loss", "eval_loss", "grad_norm", "learning_rate")
ECOSYSTEM = {"json", "math", "os", "sys", "pathlib", "torch", "trl", "datasets", "peft", "transformers"}


@pytest.fixture
def run(job, tmp_path):
    job["config"].lora_dropout = 0.1  # so that the random numbers while training count too
    return train(**job, root=tmp_path)


def losses(events):
    return [(event["step"], name, event[name]) for event in events for name in LOSSES if name in event]


@pytest.mark.slow
def test_the_script_alone_gives_the_losses_of_the_run_to_the_last_digit(run, job, tmp_path, say):
    script = export_script(run, tmp_path / "elsewhere", job["training"], job["validation"])
    environment = os.environ | {"PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, str(script)], cwd=tmp_path, env=environment, check=True, capture_output=True)
    events = [json.loads(line) for line in (script.parent / "history.jsonl").read_text().splitlines()]
    theirs, ours = losses(events), losses(run.history)
    worst = max(abs(one[2] - other[2]) for one, other in zip(theirs, ours))
    say(f"exported script: {len(ours)} losses, norms and rates of the run, largest difference {worst:g}")
    assert theirs == ours and len([row for row in ours if row[1] == "eval_loss"]) >= 3
    assert (script.parent / "adapter/adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_the_script_of_a_selective_plan_trains_selectively(job, tmp_path):
    """TRL's own setting for it stops transformers 5.16 and newer at the first step."""
    job["plan"] = replace(job["plan"], checkpointing="selective")
    run = train(**job, root=tmp_path)
    script = export_script(run, tmp_path / "elsewhere", job["training"], job["validation"])
    looked = script.read_text().replace(
        "trainer.save_model(",
        "from helpers.compat import get_checkpointing\nprint('mode:', get_checkpointing(trainer.model))\ntrainer.save_model(",
    )
    script.write_text(looked)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
    )
    assert "mode: selective" in done.stdout
    events = [json.loads(line) for line in (script.parent / "history.jsonl").read_text().splitlines()]
    assert losses(events) == losses(run.history)


@pytest.mark.parametrize(
    "card, words, absent",
    [
        ("T4", ['setdefault("CUDA_VISIBLE_DEVICES", "0")', "expandable_segments", "use_gqa_in_sdpa"], []),
        ("RTX 3060", ['setdefault("CUDA_VISIBLE_DEVICES", "0")', "expandable_segments"], ["use_gqa_in_sdpa"]),
        ("RTX 3060 on Windows", ["use_gqa_in_sdpa"], ["expandable_segments"]),
    ],
)
def test_the_script_sets_a_card_up_as_the_plan_counts_on_it(job, card, words, absent):
    gpu = KNOWN_GPUS[card.removesuffix(" on Windows")]
    gpu = replace(gpu, flash=False, expandable=False) if card.endswith("Windows") else gpu
    text = script_text(job["config"], make_plan(job["config"], gpu, exact=False), 100)
    ast.parse(text)
    assert all(word in text for word in words) and not any(word in text for word in absent)
    begin = text.index("CUDA_VISIBLE_DEVICES")
    assert begin < text.index("import torch")


def test_it_imports_the_ecosystem_only_and_is_short(run, job, tmp_path, say):
    text = export_script(run, tmp_path / "elsewhere", job["training"], job["validation"]).read_text()
    tree = ast.parse(text)
    imported = {
        (getattr(node, "module", None) or node.names[0].name).split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
    }
    assert imported <= ECOSYSTEM
    statements = sum(isinstance(node, ast.stmt) for node in ast.walk(tree))
    say(f"exported script: {len(text.splitlines())} lines, {statements} statements")
    assert statements <= 70 and max(map(len, text.splitlines())) <= 132


def test_on_a_t4_it_carries_the_fp16_settings_and_no_yaml(run, job, tmp_path, capsys):
    plan = make_plan(job["config"], KNOWN_GPUS["T4"], exact=False)
    run.plan |= {"card": "Tesla T4", "device": "cuda", "dtype": plan.dtype, "optimizer": plan.optimizer}
    script = export_script(run, tmp_path / "elsewhere", job["training"], job["validation"])
    text = script.read_text()
    ast.parse(text)
    assert "fp16=True, bf16=False" in text and "use_gqa_in_sdpa" in text and "avx512" not in text
    assert not (script.parent / "sft.yaml").exists() and "no place to cast them back" in capsys.readouterr().out


def test_the_yaml_is_what_trls_own_parser_understands(job):
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, SFTConfig

    plan = make_plan(job["config"], KNOWN_GPUS["RTX 4060"], exact=False)
    settings = yaml.safe_load(trl_yaml(job["config"], plan, 18))
    known = {
        name
        for kind in (ScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig)
        for name in kind.__dataclass_fields__
    }
    assert set(settings) <= known
    assert settings["bf16"] is True and settings["load_in_4bit"] is True and settings["lora_r"] == job["config"].r
    assert settings["learning_rate"] == job["config"].learning_rate


@pytest.mark.slow
def test_trl_sft_trains_with_the_yaml(run, job, tmp_path):
    run.plan["dtype"] = "bfloat16"
    folder = export_script(run, tmp_path / "elsewhere", job["training"], job["validation"]).parent
    command = [sys.executable, "-m", "trl.scripts.sft", "--config", "sft.yaml", "--use_cpu", "true"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert (folder / "checkpoints/adapter_model.safetensors").is_file()


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
    for name in ("device", "seq_len", "loss_tile", "training_examples", "validation_examples"):
        run.plan.pop(name)
    plan = plan_of(run)
    assert (plan.gpu.kind, plan.seq_len, plan.micro_batch) == ("cpu", 128, 2)

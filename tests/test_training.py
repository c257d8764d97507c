"""A whole run on the tiny model: masked loss, evaluation before the first step, best step kept, found again."""

import json
import math
from dataclasses import replace

import pytest
import torch
import trl.trainer.utils as trl_utils

from helpers.models import load_adapter, load_quantized
from helpers.train import build_trainer, train


def test_only_the_answer_counts_in_the_loss_and_the_end_token_is_trained(job, tmp_path):
    trainer = build_trainer(**job, output_dir=tmp_path)
    example = trainer.train_dataset[0]
    trained = [token for token, label in zip(example["input_ids"], example["labels"]) if label != -100]
    answer = job["training"][0]["completion"][0]["content"]
    assert job["tokenizer"].decode(trained).startswith(answer)
    assert job["tokenizer"].eos_token_id in trained
    assert sum(label == -100 for label in example["labels"]) >= len(job["training"][0]["prompt"][0]["content"])


def test_adapters_stay_fp32_although_trl_casts_them(job, tmp_path):
    trainer = build_trainer(**job, output_dir=tmp_path)
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}


def test_skipping_masked_positions_and_small_tiles_do_not_change_the_loss(job, tmp_path, monkeypatch):
    losses = [build_trainer(**job, output_dir=tmp_path).evaluate()["eval_loss"]]
    job["plan"] = replace(job["plan"], loss_tile=64)
    losses.append(build_trainer(**job, output_dir=tmp_path).evaluate()["eval_loss"])
    trainer = build_trainer(**job, output_dir=tmp_path)
    monkeypatch.setattr(trl_utils, "_use_triton", lambda device: False)  # TRL without us: every position, then the mask
    losses.append(trainer.evaluate()["eval_loss"])
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-5)


def test_a_run_leaves_everything_on_disk_and_is_found_again(job, tmp_path, capsys):
    run = train(**job, root=tmp_path)
    assert run.finished and run.folder == tmp_path / "tiny"
    lines = [json.loads(line) for line in (run.folder / "history.jsonl").read_text().splitlines()]
    assert lines == run.history
    assert lines[0]["step"] == 0 and "eval_loss" in lines[0]
    assert all(math.isfinite(event["loss"]) for event in lines if "loss" in event)
    assert run.evaluations[-1][0] == 7  # although 7 is no multiple of the steps between evaluations
    assert run.best_eval_loss < run.first_eval_loss
    names = {file.name for file in run.adapter.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "loss.png"} <= names
    assert not any(name.endswith(".bin") for name in names) and not (run.folder / "checkpoints").exists()
    assert "README.md" not in names  # PEFT's empty form is removed; the card is written when the folder is shared

    capsys.readouterr()
    found = train(**job, root=tmp_path)
    assert found.folder == run.folder and "already holds this very run" in capsys.readouterr().out
    assert found.history == run.history and found.best_step == run.best_step

    anew = train(**job, root=tmp_path, restart=True)
    assert anew.folder == tmp_path / "tiny-2"
    losses = [[event.get("loss") for event in each.history] for each in (anew, run)]
    assert losses[0] == losses[1]  # same seed, same run

    job["config"].lora_alpha = 16
    assert train(**job, root=tmp_path).folder == tmp_path / "tiny-3"


def test_the_saved_adapter_is_the_best_steps_and_answers_the_same_after_reloading(job, tmp_path):
    job["config"].learning_rate, job["config"].max_steps = 0.01, 12
    wrong = [{"role": "assistant", "content": "zzzz zzzz zzzz"}]  # what is learned makes validation worse, step by step
    job["training"] = job["training"].map(lambda example: {"completion": wrong})
    run = train(**job, root=tmp_path)
    assert 0 < run.best_step < run.evaluations[-1][0]
    assert run.best_eval_loss < run.evaluations[-1][1]
    ids = torch.arange(5, 40)[None]
    run.model.eval()
    with torch.no_grad():
        trained = run.model(input_ids=ids).logits
        base, _ = load_quantized(job["config"], job["plan"])
        reloaded = load_adapter(run.adapter, base)
        reloaded.eval()
        torch.testing.assert_close(reloaded(input_ids=ids).logits, trained, rtol=1e-5, atol=1e-5)
        with reloaded.disable_adapter():
            assert not torch.allclose(reloaded(input_ids=ids).logits, trained)

"""The bundled model, trained on the quickstart's letters as a T4 would train it: fp16 with a gradient scaler, 8-bit AdamW."""

from __future__ import annotations

import math

import pytest
import torch
from card import TensorCores, card_plan, pretend_card

from helpers import train as training
from helpers.config import TrainConfig
from helpers.data import load_examples, split
from helpers.hardware import GIB, Gpu
from helpers.models import load_quantized
from helpers.planner import make_plan
from helpers.registry import BUNDLED_MODEL

STEPS, WITHIN = 30, 0.02


@pytest.mark.slow
def test_thirty_steps_in_fp16_learn_what_fp32_learns(root, tmp_path, monkeypatch, say):
    # The quickstart's settings without a GPU, with half its letters in a step; evaluated on fewer, and only before and after.
    config = TrainConfig(
        name="fp32",
        data=str(root / TrainConfig.data),
        learning_rate=5e-4,
        effective_batch_size=2,
        max_steps=STEPS,
        num_evaluations=1,
        max_eval_samples=12,
    )
    plan = make_plan(config, Gpu("CPU", "cpu", 16 * GIB, 12 * GIB), BUNDLED_MODEL)
    data = split(load_examples(config.data), config.validation_share, config.seed)
    wanted = training.train(config, plan, *load_quantized(config, plan), *data, root=tmp_path)

    config.name, witness = "as-on-a-t4", pretend_card(monkeypatch)
    plan = card_plan(plan, "float16")
    model, tokenizer = load_quantized(config, plan)
    with TensorCores():
        run = training.train(config, plan, model, tokenizer, *data, root=tmp_path)
    apart = run.best_eval_loss / wanted.best_eval_loss - 1
    say(
        f"{STEPS} steps: validation loss {wanted.first_eval_loss:.3f} -> {wanted.best_eval_loss:.4f} in fp32, {run.best_eval_loss:.4f} as on "
        f"a T4 ({apart:+.2%}); {witness.skipped} steps skipped, loss scale {witness.trainer.accelerator.scaler.get_scale():.0f}"
    )
    losses = [event[key] for event in run.history for key in ("loss", "eval_loss", "grad_norm") if key in event]
    assert all(loss is not None and math.isfinite(loss) for loss in losses) and len(losses) > 20
    assert abs(apart) < WITHIN and run.best_eval_loss < 0.8 * run.first_eval_loss
    assert (
        witness.steps == STEPS and witness.skipped <= 3
    )  # the scaler begins at 65,536 and halves until the gradients fit
    assert witness.adapter_dtypes == {torch.float32} and witness.other_dtypes == {torch.uint8, torch.float16}

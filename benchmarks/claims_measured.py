"""The two claims that only a training can check: epochs until a model memorizes, and the time that checkpointing costs.

    python -m benchmarks.claims_measured            # both, on this machine, into benchmarks/data/claims_measured.json
    python -m benchmarks.claims_measured --only checkpointing_time

On a GPU the same commands take the model that the planner chooses. `python -m benchmarks.claims --write` puts the recorded epochs
on the page; seconds depend on the machine and are printed only.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from helpers.config import TrainConfig
from helpers.hardware import detect_gpu

RECORD = Path(__file__).parent / "data" / "claims_measured.json"
SIZES = {24: 8, 72: 6}  # training examples -> epochs, more than enough to see the validation loss turn
HELD_OUT, BATCH, TOKENS, ROUNDS = 24, 4, 256, 3


def overfitting() -> list[dict[str, Any]]:
    """Epoch at which the validation loss is lowest, by the number of training examples; same settings otherwise."""
    from helpers.data import load_examples, split
    from helpers.menu import choose_model
    from helpers.models import load_quantized
    from helpers.planner import make_plan
    from helpers.train import train

    gpu = detect_gpu()
    rows = []
    for size, epochs in SIZES.items():
        config = TrainConfig(
            name=f"epochs-{size}",
            num_train_epochs=epochs,
            effective_batch_size=BATCH,
            num_evaluations=2 * epochs,
            max_eval_samples=HELD_OUT,
            learning_rate=5e-4,
            early_stopping_patience=0,
        )
        model_id, _ = choose_model(config, gpu)
        plan = make_plan(config, gpu, model_id)
        model, tokenizer = load_quantized(config, plan)
        training, validation = split(load_examples(config.data), config.validation_share, config.seed)
        # The shortest letters only, so that it takes minutes on a CPU.
        lengths = [len(row["prompt"][0]["content"]) + len(row["completion"][0]["content"]) for row in training]
        chosen = training.select(sorted(range(len(training)), key=lengths.__getitem__)[:size])
        with tempfile.TemporaryDirectory() as folder:
            run = train(config, plan, model, tokenizer, chosen, validation.select(range(HELD_OUT)), root=folder)
        per_epoch = size // BATCH
        losses = {round(step / per_epoch, 2): round(loss, 2) for step, loss in run.evaluations}
        rows.append(
            {
                "model": model_id,
                "examples": size,
                "epochs": epochs,
                "best_epoch": round(run.best_step / per_epoch, 1),
                "learning_rate": config.learning_rate,
                "validation_loss_by_epoch": losses,
            }
        )
        print(
            f"{model_id}, {size} examples: lowest validation loss after {rows[-1]['best_epoch']} epochs; {losses}",
            flush=True,
        )
    return rows


def checkpointing_time() -> None:
    """Seconds of a training step (forward and backward pass) with checkpointing off and on, on this machine."""
    import torch

    from helpers.menu import choose_model
    from helpers.models import attach_lora, load_quantized
    from helpers.planner import make_plan

    config, gpu = TrainConfig(), detect_gpu()
    model_id, _ = choose_model(config, gpu)
    base, _ = load_quantized(config, make_plan(config, gpu, model_id))
    model = attach_lora(base, config).train()
    tokens = torch.randint(100, 40000, (2, TOKENS), device=model.device)
    seconds: dict[str, list[float]] = {"off": [], "on": []}
    for round_number in range(ROUNDS + 1):  # in turn, so that the machine's mood strikes both; the first round warms up
        for mode, times in seconds.items():
            if mode == "on":
                model.gradient_checkpointing_enable({"use_reentrant": False})
            else:
                model.gradient_checkpointing_disable()
            started = time.perf_counter()
            with torch.autocast(gpu.kind, torch.float16, enabled=gpu.kind == "cuda"):
                model(input_ids=tokens, labels=tokens).loss.backward()
            if gpu.kind == "cuda":
                torch.cuda.synchronize()
            model.zero_grad()
            if round_number:
                times.append(time.perf_counter() - started)
    off, on = (statistics.median(seconds[mode]) for mode in ("off", "on"))
    print(
        f"checkpointing on {gpu.name}, {model_id}, 2 x {TOKENS} tokens: {off:.2f} s off, {on:.2f} s on, {on / off - 1:+.0%}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=["overfitting", "checkpointing_time"])
    only = parser.parse_args().only
    if only != "overfitting":
        checkpointing_time()
    if only != "checkpointing_time":
        RECORD.write_text(json.dumps(overfitting(), indent=1) + "\n", encoding="utf-8")
        print(f"recorded in {RECORD.name}; now: python -m benchmarks.claims --write")


if __name__ == "__main__":
    main()

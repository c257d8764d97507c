"""What do the helpers add to the time of the same training, written directly with TRL?

    python -m benchmarks.overhead [--steps 8] [--rounds 2] [--untouched]

Both train the bundled model on the same examples, in turn: bare, helpers, bare, helpers, ... in one process, so that the
machine's mood strikes both; first one step of each, to warm up. Loading the model is not counted; evaluation and saving are (in
both), and so are the helpers' guards, history, checkpoints with their checksums, and the live chart, drawn as in a notebook. One
evaluation in eight steps is more than the quickstart's one in fourteen. Prints every time and the ratio of the shortest, in
which another program disturbed least.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import tempfile
import time

import trl.trainer.utils as trl_utils
from transformers.utils import logging as transformers_logging
from trl import SFTTrainer

from helpers import live, plots
from helpers.compat import use_loss_head
from helpers.config import TrainConfig
from helpers.data import load_examples, split
from helpers.hardware import detect_gpu
from helpers.menu import choose_model
from helpers.models import attach_lora, load_quantized
from helpers.planner import make_plan
from helpers.recipe import sft_config
from helpers.train import train

ORIGINAL = trl_utils._use_triton


class NoScreen:
    """Takes the pictures that a notebook would show."""

    def update(self, picture: object) -> None: ...


def draw_as_in_a_notebook() -> None:
    plots.display = lambda *things, **options: NoScreen()
    live.has_notebook = lambda: True


def bare(config, plan, model, tokenizer, training, validation, folder) -> None:
    """The same training with nothing but transformers, PEFT and TRL."""
    trainer = SFTTrainer(
        model=attach_lora(model, config),
        args=sft_config(config, plan, folder, len(training)),
        train_dataset=training,
        eval_dataset=validation.select(range(config.max_eval_samples)),
        processing_class=tokenizer,
    )
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    trainer.train()
    trainer.save_model(f"{folder}/adapter")


def main() -> float:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--untouched", action="store_true", help="bare TRL without the helpers' shortcut on a CPU")
    arguments = parser.parse_args()
    transformers_logging.set_verbosity_error()
    draw_as_in_a_notebook()

    config = TrainConfig(max_steps=arguments.steps, effective_batch_size=4, max_eval_samples=4, num_evaluations=1)
    gpu = detect_gpu()
    plan = make_plan(config, gpu, choose_model(config, gpu, hub_reachable=False)[0])
    model, tokenizer = load_quantized(config, plan)
    parts = split(load_examples(config.data), config.validation_share, config.seed)
    job = (config, plan, model, tokenizer, *parts)

    seconds: dict[str, list[float]] = {"bare": [], "helpers": []}
    for number in range(arguments.rounds + 1):
        config.max_steps = arguments.steps if number else 1
        for name in seconds:
            trl_utils._use_triton = ORIGINAL
            if name == "bare" and not arguments.untouched and gpu.kind == "cpu":
                use_loss_head(plan.loss_head, plan.loss_tile)
            with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
                started = time.perf_counter()
                bare(*job, folder) if name == "bare" else train(*job, root=folder)
                spent = time.perf_counter() - started
            if number:  # the first round warms up
                seconds[name].append(spent)
                print(f"{name:>8}: {spent:6.1f} s", flush=True)
    ratio = min(seconds["helpers"]) / min(seconds["bare"])
    print(f"helpers take {ratio:.3f} times as long as bare TRL (bar: 1.05)")
    return ratio


if __name__ == "__main__":
    main()

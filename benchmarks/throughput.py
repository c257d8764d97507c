"""How many tokens a second does this CPU train, cut by the kit, and cut as others do?

    python -m benchmarks.throughput             # about 50 minutes on two cores
    python -m benchmarks.throughput --quick     # under 10: only 48 of the 256 examples, and 4 of the quickstart's 56 steps
    python -m benchmarks.throughput --cpu-cost  # what a micro-batch costs beside its tokens: the constants of `helpers.cutting`

Trains the bundled model in NF4 on 256 examples whose lengths are distributed as in Alpaca's data (log-normal, median 148 tokens, cut at
1,024; half of each is trained), made of texts of `data_samples/`, 16 in a step. "Stock" is TRL's `SFTTrainer` in fp32 without anything of
the kit's. In each round all ways train on the same examples, in turn and in one process, so that the machine's mood strikes all; what is
printed is the median of the rounds' ratios. Padding is counted where the loss is computed, for all ways alike.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import trl.kernels.chunked_logprob as trl_kernels
import trl.trainer.utils as trl_utils
from datasets import Dataset
from transformers import TrainerCallback
from transformers.utils import logging as transformers_logging
from trl import SFTConfig, SFTTrainer

import helpers.trainer
from helpers.compat import set_checkpointing, use_loss_head
from helpers.config import TrainConfig
from helpers.cutting import Mode, Piece, cut
from helpers.data import load_examples, split
from helpers.hardware import detect_gpu
from helpers.menu import choose_model
from helpers.models import attach_lora, load_quantized
from helpers.plan import Plan
from helpers.planner import make_plan
from helpers.train import build_trainer, train

MEDIAN, SIGMA, SHORTEST, LONGEST = 148, 0.8, 40, 1024  # tokens; this sigma leaves 70 % of micro-batches of two unpadded
EXAMPLES, PER_STEP = 256, 16
BARS = {"fixed 2x8 + checkpointing": 2.2, "fixed 2x8": 1.5, "TRL's length grouping, 2x8": 1.2}
QUICKSTART_BAR, PADDING_BAR = 1.05, 0.15
QUICKSTART_ROUNDS = 5
SHAPES = [(1, 32), (1, 64), (1, 128), (1, 256), (1, 512), (1, 1024), (2, 64), (2, 256), (2, 512), (4, 32), (4, 128)]
SHAPES += [(4, 256), (8, 64), (8, 128), (16, 64)]  # examples, tokens of each
TRLS_OWN = [(module, name, getattr(module, name)) for module in (trl_utils, trl_kernels) for name in ("_use_triton",)]
TRLS_OWN.append((trl_utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE))


@dataclass
class Job:
    """What every way trains with."""

    config: TrainConfig
    plan: Plan
    model: Any
    tokenizer: Any


def prepare(**settings: Any) -> Job:
    """The bundled model, planned for this machine's CPU, without early stopping."""
    config, gpu = TrainConfig(early_stopping_patience=0, **settings), detect_gpu()
    plan = make_plan(config, gpu, choose_model(config, gpu, hub_reachable=False)[0])
    return Job(config, plan, *load_quantized(config, plan))


def alpaca_like(tokenizer: Any) -> Dataset:
    """Examples of the wanted lengths: the first half of each is the prompt. Text of the samples, as long as it takes."""
    rows = [
        row for name in ("customer_support", "python_functions") for row in load_examples(f"data_samples/{name}.jsonl")
    ]
    text = "\n".join(row["prompt"][-1]["content"] + "\n" + row["completion"][0]["content"] for row in rows)
    ids = np.array(tokenizer(text, verbose=False)["input_ids"])
    chance = np.random.default_rng(0)
    lengths = np.clip(chance.lognormal(np.log(MEDIAN), SIGMA, EXAMPLES), SHORTEST, LONGEST).astype(int)
    template = len(
        tokenizer.apply_chat_template(
            [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}], return_dict=True
        )["input_ids"]
    )

    def example(length: int) -> dict[str, Any]:
        start, answer = chance.integers(len(ids) - length), length // 2
        said = [
            tokenizer.decode(part).strip()
            for part in np.split(ids[start : start + max(2, length - template)], [-answer])
        ]
        return {
            "prompt": [{"role": "user", "content": said[0]}],
            "completion": [{"role": "assistant", "content": said[1]}],
        }

    return Dataset.from_list([example(length) for length in lengths])


# ------------------------------------------------------------------------------------------------ ways to train


def by_the_kit(job: Job, examples: Dataset, folder: str) -> SFTTrainer:
    """The kit's own trainer, without evaluations."""
    trainer = build_trainer(job.config, job.plan, job.model, job.tokenizer, examples, examples, folder)
    trainer.args.eval_strategy = trainer.args.save_strategy = "no"
    trainer.args.eval_on_start = trainer.args.load_best_model_at_end = False
    return trainer


def stock(**settings: Any) -> Callable[[Job, Dataset, str], SFTTrainer]:
    """TRL as it comes, with micro-batches of 2."""

    def build(job: Job, examples: Dataset, folder: str) -> SFTTrainer:
        for module, name, value in TRLS_OWN:
            setattr(module, name, value)
        model = attach_lora(job.model, job.config)
        set_checkpointing(model, "off")  # what the trainer before it may have left
        arguments = SFTConfig(
            output_dir=folder,
            max_length=LONGEST,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=PER_STEP // 2,
            bf16=False,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            num_train_epochs=1,
            **settings,
        )
        trainer = SFTTrainer(model=model, args=arguments, train_dataset=examples, processing_class=job.tokenizer)
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        return trainer

    return build


WAYS: dict[str, Callable[[Job, Dataset, str], SFTTrainer]] = {
    "the kit": by_the_kit,
    "fixed 2x8 + checkpointing": stock(gradient_checkpointing=True),
    "fixed 2x8": stock(gradient_checkpointing=False),
    "TRL's length grouping, 2x8": stock(gradient_checkpointing=False, train_sampling_strategy="group_by_length"),
}


@dataclass
class Epoch:
    """One epoch, measured."""

    seconds: float
    real: int
    computed: int
    passes: int


class Clock(TrainerCallback):
    """Seconds of the optimizer steps alone, from the first piece of a step to the optimizer's end."""

    seconds = began = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds += time.perf_counter() - self.began


def measured(build: Callable[[Job, Dataset, str], SFTTrainer], job: Job, examples: Dataset) -> Epoch:
    """Train one epoch; nothing but the steps is timed."""
    with tempfile.TemporaryDirectory() as folder, quiet():
        trainer = build(job, examples, folder)
        epoch, compute = Epoch(0.0, 0, 0, 0), trainer.compute_loss

        def counted(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            epoch.real += int(inputs["attention_mask"].sum())
            epoch.computed += inputs["input_ids"].numel()
            epoch.passes += 1
            return compute(model, inputs, *args, **kwargs)

        trainer.compute_loss = counted
        clock = Clock()
        trainer.add_callback(clock)
        trainer.train()
    epoch.seconds = clock.seconds
    return epoch


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def compare(job: Job, rounds: int, per_round: int) -> bool:
    """All ways on the same examples, round after round. Are all bars met?"""
    examples = alpaca_like(job.tokenizer)
    for build in WAYS.values():
        measured(build, job, examples.select(range(4)))  # warms up
    results: dict[str, list[Epoch]] = {name: [] for name in WAYS}
    for number in range(rounds):
        chosen = examples.select(range(number * per_round, (number + 1) * per_round))
        for name, build in WAYS.items():
            epoch = measured(build, job, chosen)
            results[name].append(epoch)
            speed = f"{epoch.real / epoch.seconds:.0f} real tokens/s, {epoch.passes} micro-batches"
            print(f"  round {number + 1}, {name}: {epoch.real} tokens in {epoch.seconds:.1f} s, {speed}", flush=True)
    kit, met = results.pop("the kit"), []
    for name, theirs in results.items():
        ratios = [(ours.real / ours.seconds) / (other.real / other.seconds) for ours, other in zip(kit, theirs)]
        met.append(say(f"real tokens/s against {name}", ratios, BARS[name]))
    for name, epochs in {"the kit": kit, **results}.items():
        print(f"padding, {name}: {share_of_padding(epochs):.1%} of the computed tokens")
    return all(met) and share_of_padding(kit) <= PADDING_BAR


def share_of_padding(epochs: list[Epoch]) -> float:
    return 1 - sum(epoch.real for epoch in epochs) / sum(epoch.computed for epoch in epochs)


def say(what: str, ratios: list[float], bar: float) -> bool:
    """The one line of a comparison. Is its bar met?"""
    middle = statistics.median(ratios)
    print(f"{what}: {middle:.2f}x ({min(ratios):.2f} to {max(ratios):.2f} in {len(ratios)} rounds; bar {bar}x)")
    return middle >= bar


# ------------------------------------------------------------------------------------------------ the quickstart


def in_order(size: int) -> Callable[[list[int], list[Mode]], list[Piece]]:
    """The fixed cut: so many examples at a time, as they come."""

    def cut_in_order(lengths: list[int], modes: list[Mode]) -> list[Piece]:
        parts = [tuple(range(len(lengths)))[start : start + size] for start in range(0, len(lengths), size)]
        return [Piece(part, 0, max(lengths[example] for example in part)) for part in parts]

    return cut_in_order


def quickstart(steps: int, evaluations: int) -> bool:
    """The quickstart's training, its evaluations, checkpoints and history included, cut by tokens and cut as planned. Is its bar met?"""
    job = prepare(
        learning_rate=5e-4, max_steps=steps, effective_batch_size=4, max_eval_samples=24, num_evaluations=evaluations
    )
    parts = split(load_examples(job.config.data), job.config.validation_share, job.config.seed)
    cuts = {"fixed": in_order(job.plan.micro_batch), "by tokens": cut}
    ratios, padding = [], {}
    for number in range(QUICKSTART_ROUNDS):
        seconds = {}
        for name, way in cuts.items():
            helpers.trainer.cut = way
            with tempfile.TemporaryDirectory() as folder, quiet():
                run = train(job.config, job.plan, job.model, job.tokenizer, *parts, root=folder)
            seconds[name] = run.seconds
            padding[name] = statistics.mean(event["padding"] for event in run.history if "padding" in event)
        ratios.append(seconds["fixed"] / seconds["by tokens"])
        print(
            f"  round {number + 1}, quickstart: {', '.join(f'{name} {s:.1f} s' for name, s in seconds.items())}",
            flush=True,
        )
    helpers.trainer.cut = cut
    print(f"padding, quickstart: {padding['by tokens']:.1%} of the computed tokens; fixed {padding['fixed']:.1%}")
    return say("quickstart against the kit's fixed cut", ratios, QUICKSTART_BAR) and padding["by tokens"] <= PADDING_BAR


# ------------------------------------------------------------------------------------------------ what a pass costs


def cpu_cost(rounds: int = 4) -> None:
    """Fit seconds = pass + tokens x (token + length x pair) to micro-batches of many shapes, by least squares of relative errors."""
    job = prepare(max_length=LONGEST)
    model = attach_lora(job.model, job.config)
    use_loss_head(job.plan.loss_head, job.plan.loss_tile)
    trl_utils.add_fused_lm_head(model.get_base_model(), outputs=("log_probs", "entropy", "is_top1"))
    model.train()
    chance, times = torch.Generator().manual_seed(0), dict.fromkeys(SHAPES, float("inf"))
    for _ in range(rounds + 1):
        for rows, length in SHAPES:
            ids = torch.randint(5, 40_000, (rows, length), generator=chance)
            labels = ids.masked_fill(torch.arange(length) < length // 2, -100)
            began = time.perf_counter()
            outputs = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels, fused_lm_head=True)
            outputs.log_probs.sum().backward()
            times[rows, length] = min(times[rows, length], time.perf_counter() - began)
            model.zero_grad()
    seconds = np.array(list(times.values()))
    work = np.array([[1, rows * length, rows * length**2] for rows, length in times])
    (one_pass, token, pair), *_ = np.linalg.lstsq(work / seconds[:, None], np.ones(len(seconds)))
    worst = np.abs(work @ [one_pass, token, pair] / seconds - 1).max()
    print(
        f"a token takes {1000 * token:.2f} ms; a pass costs as much as {one_pass / token:.0f} tokens, a pair {pair / token:.5f}"
    )
    print(f"the fit is within {worst:.0%} of all {len(SHAPES)} shapes")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="48 examples and 4 steps of the quickstart")
    parser.add_argument("--cpu-cost", action="store_true", help="measure the constants of helpers.cutting")
    arguments = parser.parse_args()
    transformers_logging.set_verbosity_error()
    if arguments.cpu_cost:
        cpu_cost()
        return 0
    job = prepare(max_length=LONGEST, effective_batch_size=PER_STEP, num_train_epochs=1)
    met = compare(job, *((3, PER_STEP) if arguments.quick else (4, EXAMPLES // 4)))
    del job
    met &= quickstart(*((4, 1) if arguments.quick else (56, 4)))
    return int(not met)


if __name__ == "__main__":
    sys.exit(main())

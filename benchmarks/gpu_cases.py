"""One case of `benchmarks.gpu`, in a process of its own: plan, build the model, hold the process to the card's size, train, measure.

    python -m benchmarks.gpu_cases '{"step": "bf16", "kind": "training", ...}' result.json

`result.json` is written again whenever something more is known. Memory is in MiB. Peaks are taken from `torch.cuda` after the
allocator's cache was emptied, and each has a dry run of the same step beside it (`predicted`). `planned_reserved_mib` is what the
plan itself was made with: the same step, but with the marks that loading from files leaves in the allocator.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, TrainerCallback
from transformers.integrations import sdpa_attention

from benchmarks.gpu import EFFECTIVE_BATCH, Case
from benchmarks.gpu_model import lengths, make_tokenizer, prompts, random_model, texts
from helpers import train as training
from helpers.compat import get_checkpointing, repeat_shared_keys, triton_works, working_head
from helpers.config import TrainConfig
from helpers.cutting import Mode
from helpers.dryrun import Peak, Step, measure
from helpers.files import atomic_write
from helpers.hardware import AMPERE, GIB, KNOWN_GPUS, MIB, Gpu, attention, compute_dtype, detect_gpu
from helpers.models import _calculate_in, attach_lora, free_memory, generate, load_quantized, release_last_model
from helpers.plan import Plan, step_of
from helpers.planner import DoesNotFit, make_plan
from helpers.registry import CATALOG, ModelShape
from helpers.trainer import OOMSafeTrainer

WARM_UP = 2  # optimizer steps that are left out of the seconds: kernels are chosen and compiled, the allocator fills
TIGHTER = 0.9  # of what a training needs: certainly too little for it
SHARED_KEYS = getattr(sdpa_attention, "use_gqa_in_sdpa", None)  # transformers' own answer, before the kit changes it
TRAINING_SECONDS = 100  # after which a training ends early
NEW_TOKENS = 32  # for each prompt
PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate", "triton")
PLANNED = (
    "dtype",
    "seq_len",
    "micro_batch",
    "accumulation",
    "checkpointing",
    "offload",
    "loss_head",
    "loss_tile",
    "eval_batch",
    "generation_batch",
    "optimizer",
)


class Skipped(RuntimeError):
    """This card cannot show it. The message says why."""


class Result:
    """What is known so far, on disk as soon as it is known."""

    def __init__(self, file: Path) -> None:
        self.file, self.values = file, {}

    def add(self, **values: Any) -> None:
        self.values |= values
        atomic_write(self.file, json.dumps(self.values))

    def add_run(self, name: str, **values: Any) -> None:
        """One measured part of the case, such as "training" or "evaluation"."""
        self.add(runs=self.values.get("runs", {}) | {name: values})

    def add_to_run(self, name: str, **values: Any) -> None:
        self.add_run(name, **self.values["runs"][name] | values)


# -------------------------------------------------------------------------------------------------------- the card


def planned_card(case: Case) -> Gpu:
    """This machine's card as if it had `case.gib` GiB free, and the traits of the case.

    Raises:
        Skipped: it is smaller than that, or the case is about bf16, which it does not have.
    """
    here, wanted = detect_gpu(), int(case.gib * GIB)
    if case.step == "bf16" and here.capability < AMPERE:
        raise Skipped(f"{here.name} has no bf16")
    if wanted > here.total_bytes * 1.01:
        raise Skipped(f"{here.name} has {here.total_bytes / GIB:.1f} GiB, not {case.gib}")
    size = min(wanted, here.free_bytes)  # on a card of this very size, a little is taken already
    gpu = replace(here, total_bytes=size, free_bytes=size, has_context=True, fused_head=case.head)
    return replace(gpu, capability=KNOWN_GPUS["T4"].capability, flash=False) if case.fp16 else gpu


def use_attention_of(gpu: Gpu) -> None:
    """Let PyTorch choose among the attention kernels that `gpu` has; without flash attention, keys are repeated as the kit does there."""
    flash = attention(gpu)[0] == "flash"
    repeat_shared_keys(not flash)
    torch.backends.cuda.enable_flash_sdp(flash)
    torch.backends.cuda.enable_cudnn_sdp(flash)


def kernels() -> dict[str, bool]:
    """What `use_attention_of` has set."""
    sdp = torch.backends.cuda
    return {
        "flash": sdp.flash_sdp_enabled(),
        "efficient": sdp.mem_efficient_sdp_enabled(),
        "cudnn": sdp.cudnn_sdp_enabled(),
        "keys_repeated": getattr(sdpa_attention, "use_gqa_in_sdpa", None) is not SHARED_KEYS,
    }


def hold_to(size: int) -> None:
    """Let the allocator of this process reserve at most `size` bytes. The context is not counted, as in `Gpu.has_context`."""
    empty()
    torch.cuda.set_per_process_memory_fraction(min(1.0, size / torch.cuda.mem_get_info()[1]))


def empty() -> None:
    free_memory()
    torch.cuda.empty_cache()


def mib(size: int) -> float:
    return round(size / MIB, 1)


def outside_pytorch() -> float:
    """MiB that are in use on the card but not reserved by PyTorch's allocator: contexts, kernels, libraries, other processes."""
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return mib(total - free - torch.cuda.memory_reserved())


def segments_grow() -> bool:
    """Does the allocator really have segments that grow?"""
    return any(segment.get("is_expandable") for segment in torch.cuda.memory_snapshot())


def describe_machine() -> dict[str, Any]:
    try:
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(asked, capture_output=True, text=True, timeout=20).stdout.split()[0]
    except (OSError, IndexError, subprocess.TimeoutExpired):
        driver = "unknown"
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    variables = ("PYTORCH_ALLOC_CONF", "TORCH_CUDNN_SDPA_DEPRIORITIZED", "CUBLAS_WORKSPACE_CONFIG")
    return {
        "card": torch.cuda.get_device_name(0),
        "capability": list(torch.cuda.get_device_capability(0)),
        "driver": driver,
        "cuda": torch.version.cuda,
        "versions": versions,
        "environment": {name: os.environ[name] for name in variables if name in os.environ},
    }


# ------------------------------------------------------------------------------------------------ what is looked at


class Watch(TrainerCallback):
    """Seconds and losses of each optimizer step, and how many of them fp16's gradient scaler skipped.

    A training that takes too long ends early, so that what it measured is recorded before its case runs out of time.
    """

    def __init__(self) -> None:
        self.first_step = 0
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.skipped = 0
        self.began = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.first_step = state.global_step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        torch.cuda.synchronize()
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.began)
        self.skipped += bool(getattr(optimizer, "step_was_skipped", False))
        control.should_training_stop |= sum(self.seconds) > TRAINING_SECONDS

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        if "loss" in logs:
            self.losses.append(logs["loss"])


class Shapes:
    """Stands before the trainer's loss and counts the micro-batches that the model is trained with."""

    def __init__(self, trainer: OOMSafeTrainer, plan: Plan) -> None:
        self.compute_loss, self.plan = trainer.compute_loss, plan
        self.all = self.padded = self.worst = 0
        trainer.compute_loss = self

    def __call__(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if model.training:
            self.count(inputs["attention_mask"].sum(1).tolist())
        return self.compute_loss(model, inputs, *args, **kwargs)

    def count(self, sizes: list[int]) -> None:
        full = sum(size == self.plan.seq_len for size in sizes)
        padded = min(sizes) < max(sizes)
        self.all += 1
        self.padded += padded
        # The worst that was planned for: all but one have the full length, and that one brings the mask.
        self.worst += full == len(sizes) == 1 or (padded and len(sizes) == self.plan.micro_batch == full + 1)


# -------------------------------------------------------------------------------------------------------- a training


@dataclasses.dataclass
class Bench:
    """What a case needs: the plan, the model in memory, and where results go."""

    case: Case
    config: TrainConfig
    plan: Plan
    shape: ModelShape
    model: PreTrainedModel
    tokenizer: Any
    result: Result

    def predict(self, phase: str = "train", batch: int = 0, **changes: Any) -> Peak:
        """The dry run of what is measured here: weights were not loaded from files, so without what loading leaves behind."""
        return measure(replace(step_of(self.config, self.plan, self.shape, phase, batch), load_in="", **changes))

    def plan_with(self, **changes: Any) -> None:
        """Change the plan by hand, and predict it anew."""
        self.plan = replace(self.plan, **changes)
        self.plan = replace(self.plan, measured=measure(step_of(self.config, self.plan, self.shape)))

    def trainer(self, folder: str, *, saving: bool = False, **steadiness: Any) -> tuple[OOMSafeTrainer, Watch, Shapes]:
        """The kit's own trainer, on texts in the order in which they were made. Without `saving` it only trains."""
        count = self.config.max_steps * self.config.effective_batch_size
        evaluated = self.config.max_eval_samples
        training_set = texts(lengths(count, self.plan.micro_batch, self.plan.seq_len, EFFECTIVE_BATCH))
        validation = texts(lengths(evaluated, self.plan.eval_batch, self.plan.seq_len, evaluated), seed=2)
        trainer = training.build_trainer(
            self.config, self.plan, self.model, self.tokenizer, training_set, validation, folder, **steadiness
        )
        trainer.modes[:] = [self.by_number(self.plan.micro_batch)]  # so that what was planned for is what is run
        trainer.eval_modes[:] = [self.by_number(self.plan.eval_batch)]
        trainer.args.train_sampling_strategy = "sequential"
        trainer.args.logging_steps, trainer.args.eval_on_start = 1, False
        if not saving:
            trainer.args.eval_strategy = trainer.args.save_strategy = "no"
            trainer.args.load_best_model_at_end = False
        watch = Watch()
        trainer.add_callback(watch)
        return trainer, watch, Shapes(trainer, self.plan)

    def by_number(self, examples: int) -> Mode:
        """So many examples at a time, whatever their length."""
        return Mode(self.plan.checkpointing, self.plan.offload, ((self.plan.seq_len, examples),), 1.0, 0.0)

    @contextlib.contextmanager
    def measured(self, name: str, predicted: Peak) -> Iterator[dict[str, Any]]:
        """Record the peaks and seconds of what happens inside as the run `name`, beside what a dry run predicted; after an error too."""
        empty()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        values: dict[str, Any] = {}
        began = time.perf_counter()
        try:
            yield values
        finally:
            with contextlib.suppress(RuntimeError):  # after a CUDA error, which is already on its way
                torch.cuda.synchronize()
            self.result.add_run(
                name,
                predicted_allocated_mib=mib(predicted.allocated),
                predicted_reserved_mib=mib(predicted.reserved),
                measured_allocated_mib=mib(torch.cuda.max_memory_allocated()),
                measured_reserved_mib=mib(torch.cuda.max_memory_reserved()),
                seconds=round(time.perf_counter() - began, 2),
                **values,
            )

    def train(
        self,
        name: str,
        *,
        evaluated: bool = True,
        checkpoint: Path | None = None,
        keep_in: Path | None = None,
        **steadiness: Any,
    ) -> dict[str, Any]:
        """Train as planned, record it as the run `name`, evaluate with the same trainer, and let it go; returns what was recorded.

        Args:
            checkpoint: go on from it instead of beginning anew.
            keep_in: a folder for checkpoints, written as the kit's recipe says. Default: none are written.

        Raises:
            RuntimeError: no micro-batch was the worst that was planned for.
        """
        with tempfile.TemporaryDirectory() as folder:
            trainer, watch, shapes = self.trainer(str(keep_in or folder), saving=keep_in is not None, **steadiness)
            values = {
                "planned_reserved_mib": mib(self.plan.measured.reserved),
                "trainer": type(trainer).__name__,
                "checkpointing_found": get_checkpointing(trainer.model),
                "gradient_scaler": trainer.accelerator.scaler is not None,
                "adapters": sorted({str(p.dtype) for p in trainer.model.parameters() if p.requires_grad}),
                "outside_before_mib": outside_pytorch(),
            }
            with self.measured(name, self.predict()) as more:
                more |= values
                try:
                    if checkpoint is None:
                        trainer.train()
                    else:
                        trainer.continue_from(checkpoint, [])
                finally:
                    more |= self.summary(watch)
                    more["micro_batches"] = {"all": shapes.all, "padded": shapes.padded, "worst": shapes.worst}
            self.result.add_to_run(name, outside_after_mib=outside_pytorch(), segments_grow=segments_grow())
            if not shapes.worst:
                raise RuntimeError(
                    "no micro-batch was the worst that was planned for: all of full length, but one that is padded"
                )
            if evaluated:
                self.evaluate(f"{name}: evaluation", trainer)
        return self.result.values["runs"][name]

    def summary(self, watch: Watch) -> dict[str, Any]:
        """Losses, skipped steps, and seconds and tokens of the steps after the warm-up."""
        rows, first = self.config.effective_batch_size, watch.first_step + WARM_UP
        sizes = lengths(self.config.max_steps * rows, self.plan.micro_batch, self.plan.seq_len, EFFECTIVE_BATCH)
        seconds, tokens = (
            sum(watch.seconds[WARM_UP:]),
            sum(sizes[first * rows : (watch.first_step + len(watch.seconds)) * rows]),
        )
        values = {
            "first_step": watch.first_step,
            "steps": len(watch.seconds),
            "losses": watch.losses,
            "finite_losses": sum(map(math.isfinite, watch.losses)),
            "skipped_steps": watch.skipped,
        }
        if seconds:
            per_step = seconds / (len(watch.seconds) - WARM_UP)
            values |= {"seconds_per_step": round(per_step, 3), "tokens_per_second": round(tokens / seconds)}
        return values

    def evaluate(self, name: str, trainer: OOMSafeTrainer) -> None:
        """Validation with the optimizer still there, as during a training; its state is no part of the dry run, and added here."""
        state = [
            tensor
            for values in trainer.optimizer.state.values()
            for tensor in values.values()
            if torch.is_tensor(tensor)
        ]
        beside = sum(tensor.numel() * tensor.element_size() for tensor in state)
        dry = self.predict("evaluate", self.plan.eval_batch)
        with self.measured(
            name, replace(dry, allocated=dry.allocated + beside, reserved=dry.reserved + beside)
        ) as values:
            values |= {"batch": self.plan.eval_batch, "loss": trainer.evaluate()["eval_loss"]}

    def generate(self, name: str, batch: int) -> None:
        """Answers of `NEW_TOKENS` tokens to `batch` prompts that leave room for them within the plan's length."""
        new = min(NEW_TOKENS, self.plan.seq_len // 4)
        longest = self.plan.seq_len - new
        model = attach_lora(self.model, self.config)
        model.generation_config.eos_token_id = None  # random weights may end an answer anywhere
        asked = prompts(batch, longest)
        planned = mib(self.predict("generate", batch).reserved)
        generate(model, self.tokenizer, asked, max_new_tokens=1, batch_size=batch)
        with self.measured(name, self.predict("generate", batch, seq_len=longest)) as values:
            values |= {
                "batch": batch,
                "planned_batch": self.plan.generation_batch,
                "planned_reserved_mib": planned,
                "prompt_tokens": longest,
                "new_tokens": new,
            }
            generate(model, self.tokenizer, asked, max_new_tokens=new, batch_size=batch)
        seconds = self.result.values["runs"][name]["seconds"]
        self.result.add_to_run(name, tokens_per_second=round(batch * new / max(seconds, 0.01), 1))

    def compare(self, name: str, one: dict[str, Any], other: dict[str, Any], **values: Any) -> None:
        """How far the losses of the same steps differ."""
        differences = [
            abs(a - b) for a, b in zip(one["losses"][other["first_step"] - one["first_step"] :], other["losses"])
        ]
        comparisons = self.result.values.get("comparisons", {})
        comparisons[name] = {"first_loss_differs_by": differences[0], "losses_differ_by": max(differences), **values}
        self.result.add(comparisons=comparisons)


def prepare(case: Case, result: Result, source: str = "") -> Bench:
    """Plan as a notebook does, try the loss head, build the model (or load it from the folder `source`), hold the process to the size."""
    gpu = planned_card(case)
    result.add(
        outside_at_first_mib=outside_pytorch(), expandable=gpu.expandable, planned_gib=round(gpu.free_bytes / GIB, 2)
    )
    config = TrainConfig(
        max_length=case.max_length,
        effective_batch_size=EFFECTIVE_BATCH,
        max_steps=case.steps,
        num_evaluations=2,
        early_stopping_patience=0,
    )
    plan = training.with_working_head(config, make_plan(config, gpu, source or CATALOG[case.model]))
    use_attention_of(gpu)
    if source:
        model, tokenizer = load_quantized(config, plan)
    else:
        model, tokenizer = random_model(CATALOG[case.model].shape, getattr(torch, plan.dtype)), make_tokenizer()
    bench = Bench(case, config, plan, CATALOG[case.model].shape, model, tokenizer, result)
    if case.forced:
        bench.plan_with(**case.forced)
    config.max_eval_samples = 2 * bench.plan.eval_batch
    hold_to(gpu.free_bytes)
    result.add(
        plan={name: getattr(bench.plan, name) for name in PLANNED},
        planned_seconds_per_step=bench.plan.seconds_per_step,
        attention=kernels(),
    )
    return bench


# ------------------------------------------------------------------------------------------------------- the cases


def probe(case: Case, result: Result) -> None:
    """What the driver and the libraries do here, and the way from files: load, train, release."""
    card = detect_gpu()
    shape = CATALOG[case.model].shape
    before = torch.cuda.mem_get_info()[0]
    measure(Step(model=shape.to_config(), micro_batch=1, seq_len=64))
    result.add(dry_run_took_mib=mib(before - torch.cuda.mem_get_info()[0]), flash=card.flash)
    began = time.perf_counter()
    result.add(
        triton_works=triton_works(), loss_head=working_head(), triton_seconds=round(time.perf_counter() - began, 1)
    )
    with tempfile.TemporaryDirectory() as folder:
        settings = shape.to_config()
        config = AutoConfig.for_model(settings.pop("model_type"), **settings)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
        bench = prepare(case, result, source=folder)
        bench.train("training")
    empty()
    held, free = torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[0]
    returned = release_last_model()  # although `bench` still names the model
    empty()
    result.add(
        release={
            "returned_mib": mib(returned),
            "allocated_before_mib": mib(held),
            "allocated_after_mib": mib(torch.cuda.memory_allocated()),
            "driver_got_back_mib": mib(torch.cuda.mem_get_info()[0] - free),
        }
    )


def train(case: Case, result: Result) -> None:
    """Training, evaluation and generation on the plan."""
    bench = prepare(case, result)
    bench.train("training")
    bench.generate("training: generation", bench.plan.generation_batch)


def replay(case: Case, result: Result) -> None:
    """The same training twice: with the room that it needs, and with less."""
    bench = prepare(case, result)
    whole = bench.train("with room", evaluated=False)
    needed = min(whole["planned_reserved_mib"], whole["measured_reserved_mib"])
    train_in(bench, "with too little room", TIGHTER * needed, whole)


def offload(case: Case, result: Result) -> None:
    """Activations kept on the card, planned to wait in host memory, and sent there when the card is too small for them."""
    bench = prepare(case, result)
    kept = bench.train("on the card", evaluated=False)
    bench.plan_with(offload=True)
    away = bench.train("in host memory", evaluated=False)
    bench.compare("in host memory", kept, away)
    bench.plan_with(offload=False)
    train_in(bench, "with too little room", (kept["measured_reserved_mib"] + away["measured_reserved_mib"]) / 2, kept)


def train_in(bench: Bench, name: str, size: float, whole: dict[str, Any]) -> None:
    """Train within `size` MiB, which are too few, and compare with `whole`.

    Raises:
        RuntimeError: they were enough.
    """
    changes: list[dict[str, Any]] = []
    hold_to(int(size * MIB))
    bench.compare(
        name,
        whole,
        bench.train(name, evaluated=False, on_oom_fallback=changes.append),
        changes=changes,
        held_to_mib=size,
    )
    if not changes:
        raise RuntimeError(f"{size:.0f} MiB were enough, so no step had to be done again")


def resume(case: Case, result: Result) -> None:
    """Checkpoints of a T4's training go on as they were, and on a card with bf16."""
    bench = prepare(case, result)
    with tempfile.TemporaryDirectory() as folder:
        whole = bench.train("fp16 throughout", evaluated=False, keep_in=Path(folder))
        first = min(Path(folder).glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
        bench.compare("fp16 in fp16", whole, bench.train("fp16 in fp16", evaluated=False, checkpoint=first))
        gpu = planned_card(replace(case, fp16=False))
        dtype, reason = compute_dtype(gpu, bench.shape.model_type)
        if dtype != "bfloat16":
            raise Skipped(f"nothing could be continued in bf16: {reason}")
        use_attention_of(gpu)
        _calculate_in(bench.model, torch.bfloat16)
        bench.plan_with(gpu=replace(gpu, fused_head=bench.plan.loss_head), dtype=dtype)
        bench.compare("fp16 in bf16", whole, bench.train("fp16 in bf16", evaluated=False, checkpoint=first))


def answer(case: Case, result: Result) -> None:
    """Generation with several numbers of prompts at a time, with the whole card."""
    bench = prepare(case, result)
    hold_to(torch.cuda.mem_get_info()[1])
    for batch in case.batches:
        bench.generate(f"{batch} prompts", batch)


KINDS = {"probe": probe, "training": train, "replay": replay, "offload": offload, "resume": resume, "generate": answer}


def main(arguments: list[str]) -> int:
    case, result = Case(**json.loads(arguments[0])), Result(Path(arguments[1]))
    result.add(**describe_machine())
    try:
        KINDS[case.kind](case, result)
    except DoesNotFit as error:
        result.add(does_not_fit=str(error))
    except Skipped as error:
        result.add(skipped=str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

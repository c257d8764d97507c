"""A trainer that is right on every card, and the run that it leaves on disk.

    run = train(config, plan, model, tokenizer, training, validation)

`build_trainer` returns TRL's own `SFTTrainer` (with the additions of `helpers.trainer`), set up by `helpers.recipe`; `train` adds
what is seen and what is kept: live chart, history, checkpoints, and the question whether this very run was already trained.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_callback import PrinterCallback

from helpers import checkpoints
from helpers.callbacks import (
    CheckpointKeeper,
    EarlyStopping,
    HistoryWriter,
    LossGuard,
    SpillWarning,
    StopButton,
    TrainingStopped,
)
from helpers.compat import set_checkpointing, use_loss_head, use_one_card, working_head
from helpers.config import ConfigError, TrainConfig
from helpers.export import load_adapter, save_adapter
from helpers.guards import check_before_training, check_template
from helpers.hardware import GIB, Gpu, detect_gpu
from helpers.live import LiveChart
from helpers.models import attach_lora
from helpers.plan import reserve
from helpers.plan_words import what_would_fit
from helpers.planner import DoesNotFit, Plan, make_plan
from helpers.recipe import sft_config, total_steps
from helpers.runs import Run, continue_from, find_or_start, fingerprint
from helpers.runtime import second_place
from helpers.trainer import SteadyTrainer, is_out_of_memory

PLANNED = (
    "dtype",
    "optimizer",
    "seq_len",
    "micro_batch",
    "accumulation",
    "checkpointing",
    "offload",
    "eval_batch",
    "loss_head",
    "loss_tile",
    "peak_bytes",
    "seconds_per_step",
)


def build_trainer(
    config: TrainConfig,
    plan: Plan,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    training: Dataset,
    validation: Dataset,
    output_dir: str | Path,
    **steadiness: Any,
) -> SteadyTrainer:
    """TRL's trainer for a model with a fresh adapter, with fp32 adapters on every card.

    Args:
        training, validation: `prompt` and `completion` messages, or `text`. Of `validation`, the first `config.eval_examples` count.
        steadiness: what `SteadyTrainer` takes besides.
    """
    check_template(tokenizer, training)
    plan = with_working_head(config, plan)
    use_loss_head(plan.loss_head, plan.loss_tile)
    model = attach_lora(model, config)
    arguments = sft_config(config, plan, output_dir, len(training))
    use_one_card(arguments)
    adapters = {
        name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    trainer = SteadyTrainer(
        model=model,
        args=arguments,
        train_dataset=training,
        eval_dataset=validation.select(range(min(config.eval_examples, len(validation)))),
        processing_class=tokenizer,
        full_logits=plan.loss_head == "full",
        **steadiness,
    )
    # TRL has just cast the adapters of a quantised model to bf16, which loses small updates and crashes fp16's gradient scaler
    # (trl#4901): back to fp32, and to the very values that they had.
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            parameter.data = adapters[name].to(parameter.device)
    set_checkpointing(trainer.model, plan.checkpointing)
    trainer.remove_callback(PrinterCallback)
    if config.early_stopping_patience:
        trainer.add_callback(EarlyStopping(config.early_stopping_patience))
    return trainer


def train(
    config: TrainConfig,
    plan: Plan,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    training: Dataset,
    validation: Dataset,
    *,
    again: bool = False,
    resume: str | Path | None = None,
    root: str | Path = "runs",
    copy_to: str | Path | None = None,
) -> Run:
    """Train, show it live, keep the best step's adapter, and return the `Run`.

    The same settings, model and data that were already trained give the finished run back; half trained (killed, disconnected,
    stopped), they continue from the last whole checkpoint. Changed settings get a new numbered folder.

    Args:
        again: train anew in a new folder although this very run is finished.
        resume: folder of a run to continue although settings changed, with more steps for example.
        copy_to: a second folder for runs, safe from the end of the session. Default: the mounted Google Drive, if there is one.

    Raises:
        RunMismatch: `resume` names a run with other data, another model or another adapter.
        ConfigError, DataError: found before the first step; nothing was trained.
        DoesNotFit: out of memory even with the smallest settings; says what would fit. The last checkpoint stands.
        TrainingStopped: the loss is no number any more, or the disk is full. The last checkpoint stands.
    """
    if plan.gpus > 1:
        raise ConfigError(
            f"This plan is for {plan.gpus} GPUs, and a notebook trains on one: use make_plan without gpus= here, or "
            "helpers.export.export_plan and `accelerate launch`."
        )
    settings = config.to_dict() | {"model": plan.model, "data_sha256": fingerprint(training, validation)}
    copies = Path(copy_to) if copy_to else second_place()
    run = continue_from(resume, settings) if resume else find_or_start(root, config.name, settings, again, copies)
    if run.finished and not (run.adapter / "adapter_model.safetensors").is_file():
        print(f"{run.folder} was finished, but its adapter is gone: it is trained again.")
        run.finished = False
    if run.finished:
        print(f"{run.folder} already holds this very run, finished: its adapter is loaded. again=True trains anew.")
        run.model = load_adapter(run.adapter, model)
        return run

    plan = _with_what_was_learned(_planned_for_now(config, plan, run), run, config)
    run.plan = {"card": plan.gpu.name, "device": plan.gpu.kind} | {name: getattr(plan, name) for name in PLANNED}
    run.plan |= {"training_examples": len(training), "validation_examples": len(validation)}
    steps = total_steps(config, len(training))

    def less_memory(changes: dict[str, Any]) -> None:
        run.plan |= changes
        run.save()

    likely_cause = _likely_cause(config, plan)
    trainer = build_trainer(
        config,
        plan,
        model,
        tokenizer,
        training,
        validation,
        checkpoints.checkpoints_of(run.folder),
        on_less_memory=less_memory,
        out_of_ideas=lambda: DoesNotFit(what_would_fit(config, plan)),
        likely_cause=likely_cause,
    )
    check_before_training(trainer, config, len(training))
    keeper = CheckpointKeeper(run, copies / run.folder.name if copies else None)
    stop = StopButton()
    live = LiveChart(run, plan.seconds_per_step, plan.peak_bytes)
    spill = SpillWarning(plan.gpu.free_bytes, plan.seconds_per_step)
    for callback in (stop, HistoryWriter(run), live, LossGuard(likely_cause), spill, keeper):
        trainer.add_callback(callback)

    run.save()
    checkpoints.drop_half_written(run.folder)
    checkpoint = checkpoints.latest_whole(run.folder)
    with _what_stands_is_said(run, trainer):
        with stop.listening():
            if checkpoint is None:
                print(f"Training {steps} steps of {config.effective_batch_size} examples into {run.folder}")
                trainer.train()
            elif _was_through(checkpoint, steps, config):
                trainer.model.load_adapter(str(_best_of(run, checkpoint)), "default")
            else:
                print(f"Continuing {run.folder} from step {checkpoints.step_of(checkpoint)} of {steps}")
                trainer.continue_from(checkpoint, run.history)
        run.model = trainer.model
        save_adapter(run, run.model, tokenizer)
        if stop.pressed_at is not None:
            best = f"the best step so far ({run.best_step}) is kept"
            print(f"Stopped after step {stop.pressed_at}; {best}. Run this cell again to go on.")
        else:
            run.finished = True
            shutil.rmtree(checkpoints.checkpoints_of(run.folder), ignore_errors=True)
        run.save()
    keeper.copy()
    return run


@contextmanager
def _what_stands_is_said(run: Run, trainer: SteadyTrainer) -> Iterator[None]:
    """Errors that end a training say what can be done, and from which checkpoint the run will go on."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"Stopped at once. {_what_stands(run)} Run this cell again to go on.")
        raise
    except (TrainingStopped, DoesNotFit) as error:
        raise type(error)(f"{error} {_what_stands(run)}") from None
    except Exception as error:  # tokenizers raises nothing more special
        if is_out_of_memory(error):  # where no smaller piece helps: in the optimizer
            raise DoesNotFit(f"{trainer.out_of_ideas()} {_what_stands(run)}") from error
        if not _is_disk_full(error):
            raise
        checkpoints.drop_half_written(run.folder)
        raise TrainingStopped(
            f"The disk is full: what step {trainer.state.global_step} should have left could not be written to {run.folder}. "
            f"Delete old runs (helpers.runs.delete_runs) or other files, then run this cell again. {_what_stands(run)}"
        ) from error


# ------------------------------------------------------------------------------------------- before and after the loop


def with_working_head(config: TrainConfig, plan: Plan) -> Plan:
    """`plan` with the loss head that really works here, found out by trying it. One that needs more memory is planned anew."""
    if plan.gpu.fused_head:
        return plan
    head = working_head()
    if head == plan.loss_head:
        return plan
    gpu = replace(plan.gpu, fused_head=head)
    if head == "triton":
        print("TRL's Triton kernels work on this card: computing the loss will need less memory than planned.")
        return replace(plan, gpu=gpu, loss_head=head)
    found = (
        "TRL's Triton kernels do not run here"
        if head == "torch"
        else "this version of TRL computes its loss in an unknown way"
    )
    return _planned_again(config, plan, found, gpu, plan.optimizer)


def _planned_for_now(config: TrainConfig, plan: Plan, run: Run) -> Plan:
    """`plan`; or one made anew, because the card has less memory to give by now, or because `run` was begun with another optimizer."""
    plan = with_working_head(config, plan)
    optimizer, now = run.plan.get("optimizer", plan.optimizer), detect_gpu()
    if optimizer != plan.optimizer:
        plan = _planned_again(config, plan, f"this run was begun with {optimizer}", plan.gpu, optimizer)
    if now.kind == plan.gpu.kind == "cuda" and plan.peak_bytes and now.free_bytes - plan.peak_bytes < reserve(now) / 2:
        shrunk = f"{now.free_bytes / GIB:.1f} GiB of {now.name} are free now, {plan.gpu.free_bytes / GIB:.1f} when it was planned"
        plan = _planned_again(config, plan, shrunk, replace(now, fused_head=plan.gpu.fused_head), optimizer)
    return plan


def _planned_again(config: TrainConfig, plan: Plan, because: str, gpu: Gpu, optimizer: str) -> Plan:
    """Another plan for what `plan` was for, printed with the reason.

    Raises:
        DoesNotFit: nothing fits any more.
    """
    changed = make_plan(config, gpu, plan.model, longest_example=plan.seq_len, optimizer=optimizer)
    print(f"The plan is made anew, because {because}:\n{changed}")
    return changed


def _with_what_was_learned(plan: Plan, run: Run, config: TrainConfig) -> Plan:
    """On the same card, go on with the smaller settings that an earlier part of this run had to find."""
    if run.plan.get("card") != plan.gpu.name:
        return plan
    rows = min(plan.micro_batch, run.plan["micro_batch"])
    while config.effective_batch_size % rows:
        rows -= 1
    return replace(
        plan,
        micro_batch=rows,
        accumulation=config.effective_batch_size // rows,
        checkpointing=run.plan["checkpointing"],
        offload=run.plan["offload"],
        eval_batch=min(plan.eval_batch, run.plan["eval_batch"]),
    )


def _likely_cause(config: TrainConfig, plan: Plan) -> str:
    if plan.dtype == "float16":
        return "Likely cause: numbers above 65504, which fp16 cannot hold. Halve the learning rate, or use a model made for fp16."
    return f"Likely cause: a learning rate ({config.learning_rate}) that is too high, or a broken example. Use a third of it."


def _was_through(checkpoint: Path, steps: int, config: TrainConfig) -> bool:
    """Was this checkpoint the run's last, by its steps or by early stopping? Then only the ending is left to do."""
    state = checkpoints.trainer_state(checkpoint)
    patience = state.get("stateful_callbacks", {}).get("EarlyStopping", {}).get("attributes", {})
    waited = patience.get("early_stopping_patience_counter", 0)
    return state["global_step"] >= steps or 0 < config.early_stopping_patience <= waited


def _best_of(run: Run, checkpoint: Path) -> Path:
    best_step = checkpoints.trainer_state(checkpoint)["best_global_step"]
    return checkpoints.best_checkpoint(run.folder, best_step) or checkpoint


def _what_stands(run: Run) -> str:
    last = checkpoints.latest_whole(run.folder)
    return (
        f"The checkpoint of step {checkpoints.step_of(last)} in {run.folder} stands."
        if last
        else "No checkpoint was written yet."
    )


# What Python, safetensors, tokenizers, PyTorch's writer and a quota say when nothing more can be written (seen on a full disk).
DISK_FULL = ("No space left on device", "os error 28", "inline_container", "file write failed", "Disk quota exceeded")


def _is_disk_full(error: Exception) -> bool:
    return any(words in str(error) for words in DISK_FULL)

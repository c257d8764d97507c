"""A trainer that is right on every card, and the run that it leaves on disk.

    run = train(config, plan, model, tokenizer, training, validation)

`build_trainer` returns TRL's own `SFTTrainer` (with the additions of `helpers.trainer`), set up by `helpers.recipe`; `train` adds
what is seen and what is kept: live chart, history, checkpoints, and the question whether this very run was already trained.

Checks before the first step: mistakes that would train with a normal-looking curve, or fail after an hour.

check_before_training(trainer, config)      # raises with the fix; prints what is only odd
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_callback import PrinterCallback
from trl import SFTTrainer

from helpers import checkpoints
from helpers.callbacks import (
    CheckpointCallback,
    EarlyStopping,
    JsonlLogger,
    LossGuard,
    SpillWarning,
    StopButton,
    TrainingStopped,
)
from helpers.compat import set_checkpointing, use_loss_head, use_one_card, working_head
from helpers.config import ConfigError, TrainConfig
from helpers.data import DataError
from helpers.data.tokens import TokenCheck, Tokens
from helpers.hardware import GIB, Gpu, detect_gpu
from helpers.live import LiveChart
from helpers.models import attach_lora, load_adapter, save_adapter
from helpers.plan import Plan, reserve, suggest_alternatives
from helpers.planner import DoesNotFit, make_plan
from helpers.recipe import sft_config, total_steps
from helpers.runs import Run, continue_from, find_or_start, fingerprint
from helpers.setup import backup_dir
from helpers.trainer import OOMSafeTrainer, is_out_of_memory

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
) -> OOMSafeTrainer:
    """TRL's trainer for a model with a fresh adapter, with fp32 adapters on every card.

    Args:
        training, validation: `prompt` and `completion` messages, or `text`. Of `validation`, the first `config.max_eval_samples` count.
        steadiness: what `OOMSafeTrainer` takes besides.
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
    trainer = OOMSafeTrainer(
        model=model,
        args=arguments,
        train_dataset=training,
        eval_dataset=validation.select(range(min(config.max_eval_samples, len(validation)))),
        processing_class=tokenizer,
        full_logits=plan.loss_head == "full",
        **steadiness,
    )
    # TRL has just cast the adapters of a quantized model to bf16, which loses small updates and crashes fp16's gradient scaler
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
    restart: bool = False,
    resume: str | Path | None = None,
    root: str | Path = "runs",
    copy_to: str | Path | None = None,
) -> Run:
    """Train, show it live, keep the best step's adapter, and return the `Run`.

    The same settings, model and data that were already trained give the finished run back; half trained (killed, disconnected,
    stopped), they continue from the last whole checkpoint. Changed settings get a new numbered folder.

    Args:
        restart: train anew in a new folder although this very run is finished.
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
    copies = Path(copy_to) if copy_to else backup_dir()
    run = continue_from(resume, settings) if resume else find_or_start(root, config.name, settings, restart, copies)
    if run.finished and not (run.adapter / "adapter_model.safetensors").is_file():
        print(f"{run.folder} was finished, but its adapter is gone: it is trained again.")
        run.finished = False
    if run.finished:
        print(f"{run.folder} already holds this very run, finished: its adapter is loaded. restart=True trains anew.")
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
        on_oom_fallback=less_memory,
        on_oom_exhausted=lambda: DoesNotFit(suggest_alternatives(config, plan)),
        likely_cause=likely_cause,
    )
    check_before_training(trainer, config, len(training))
    keeper = CheckpointCallback(run, copies / run.folder.name if copies else None)
    stop = StopButton()
    live = LiveChart(run, plan.seconds_per_step, plan.peak_bytes)
    spill = SpillWarning(plan.gpu.free_bytes, plan.seconds_per_step)
    for callback in (stop, JsonlLogger(run), live, LossGuard(likely_cause), spill, keeper):
        trainer.add_callback(callback)

    run.save()
    checkpoints.drop_half_written(run.folder)
    checkpoint = checkpoints.latest_complete(run.folder)
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
def _what_stands_is_said(run: Run, trainer: OOMSafeTrainer) -> Iterator[None]:
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
            raise DoesNotFit(f"{trainer.on_oom_exhausted()} {_what_stands(run)}") from error
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
    last = checkpoints.latest_complete(run.folder)
    return (
        f"The checkpoint of step {checkpoints.step_of(last)} in {run.folder} stands."
        if last
        else "No checkpoint was written yet."
    )


# What Python, safetensors, tokenizers, PyTorch's writer and a quota say when nothing more can be written (seen on a full disk).
DISK_FULL = ("No space left on device", "os error 28", "inline_container", "file write failed", "Disk quota exceeded")


def _is_disk_full(error: Exception) -> bool:
    return any(words in str(error) for words in DISK_FULL)


USUAL_LEARNING_RATES = (1e-5, 2e-3)  # LoRA: outside of this, nothing happens or everything breaks (usual: 1e-4 to 5e-4)
ABSURD_LEARNING_RATE = 0.1
EXAMPLES_LOOKED_AT = 200


def check_before_training(trainer: SFTTrainer, config: TrainConfig, given: int | None = None) -> None:
    """Look at what would really be trained: the tokens and labels of the trainer, its parameters, its settings.

    Args:
        given: how many training examples there were before TRL dropped those without a trained token.

    Raises:
        DataError: nothing in the examples would be trained, or the answers would never learn to end.
        ConfigError: a setting cannot lead to anything.
    """
    _check_parameters(trainer)
    _check_labels(trainer)
    _check_settings(trainer, config)
    lost = (given or 0) - len(trainer.train_dataset)
    if lost > 0:
        print(
            f"[WARN] {lost} of {given} examples are left out: max_length ({trainer.args.max_length}) cuts their whole answer."
        )


def _check_parameters(trainer: SFTTrainer) -> None:
    trainable = [(name, parameter) for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    if not trainable:
        raise ConfigError(
            "No parameter is trainable, so nothing would be learned. Check target_modules: it must name layers of the model."
        )
    wrong = {str(parameter.dtype) for _, parameter in trainable if parameter.dtype != torch.float32}
    if wrong:
        raise ConfigError(
            f"Adapters must be torch.float32, found {', '.join(sorted(wrong))}: small updates would be lost."
        )


def _check_settings(trainer: SFTTrainer, config: TrainConfig) -> None:
    low, high = USUAL_LEARNING_RATES
    rate, examples = config.learning_rate, len(trainer.train_dataset)
    if rate >= ABSURD_LEARNING_RATE:
        raise ConfigError(f"learning_rate={rate} would destroy the model in a few steps; LoRA uses 1e-4 to 5e-4.")
    if not low <= rate <= high:
        print(
            f"[WARN] learning_rate={rate} is unusual for LoRA ({low} to {high}): {'slow' if rate < low else 'may diverge'}."
        )
    if config.effective_batch_size > examples:
        raise ConfigError(
            f"effective_batch_size={config.effective_batch_size} is larger than the {examples} training examples: one step would "
            f"already be more than an epoch. Use {max(1, examples // 4)} or less, or add examples."
        )


def check_template(tokenizer: PreTrainedTokenizerBase, training: Dataset) -> None:
    """Messages need a chat template to become tokens; TRL would fail on the first example with less to say."""
    if "prompt" in training.column_names and not tokenizer.chat_template:
        raise DataError(
            "This tokenizer has no chat template, so questions and answers cannot be told apart. Use the model's Instruct version, "
            "or give it a plain one: helpers.data.ensure_chat_template(tokenizer)."
        )


def _check_labels(trainer: SFTTrainer) -> None:
    """The tokens that TRL will train, by the same check that the data report uses."""
    check, limit = TokenCheck(trainer.processing_class), f"max_length is {trainer.args.max_length}"
    rows = trainer.train_dataset.select(range(min(EXAMPLES_LOOKED_AT, len(trainer.train_dataset))))
    for number, row in enumerate(rows, start=1):
        check.add(row, Tokens(row["input_ids"], row["labels"]), f"Training example {number}")
    if not len(rows):
        raise DataError(
            f"Every label is masked, so nothing would be learned: the answers are empty, or cut away ({limit})."
        )
    if reason := check.stop():
        raise DataError(f"{reason} ({limit})")
    cut = check.looked_at - check.ended
    if cut:
        print(
            f"[WARN] {cut} of the first {check.looked_at} examples do not end with the end token: they are cut ({limit})."
        )

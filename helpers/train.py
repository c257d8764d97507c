"""Train a model, and leave a run on disk that survives whatever happens meanwhile.

    run = train(config, plan, model, tokenizer, training, validation)

`build_trainer` returns TRL's own `SFTTrainer` (with the additions of `helpers.trainer`), set up by `helpers.recipe`. `train` adds
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
from helpers.callbacks import CheckpointCallback, EarlyStopping, JsonlLogger, LossGuard, StopButton, TrainingStopped
from helpers.compat import set_checkpointing, use_loss_head, use_one_card, working_head
from helpers.config import ConfigError, TrainConfig
from helpers.data.tokens import with_tokens
from helpers.guards import check_before_training
from helpers.hardware import GIB, Gpu, detect_gpu
from helpers.live import LiveChart
from helpers.models import attach_lora, load_adapter, save_adapter
from helpers.plan import Plan, reserve, suggest_alternatives
from helpers.planner import DoesNotFit, make_plan
from helpers.recipe import sft_config, total_steps
from helpers.runs import Run, find_or_start, fingerprint
from helpers.setup import backup_dir
from helpers.trainer import OOMSafeTrainer, held_to_free_memory, is_out_of_memory

# What Python, safetensors, tokenizers, PyTorch's writer and a quota say when nothing more can be written (seen on a full disk).
DISK_FULL = ("No space left on device", "os error 28", "inline_container", "file write failed", "Disk quota exceeded")


def train(
    config: TrainConfig,
    plan: Plan,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    training: Dataset,
    validation: Dataset,
    *,
    restart: bool = False,
    root: str | Path = "runs",
    copy_to: str | Path | None = None,
) -> Run:
    """Train, show it live, keep the best step's adapter, and return the `Run`.

    The same settings, model and data that were already trained give the finished run back; half trained (killed, disconnected,
    stopped), they continue from the last complete checkpoint. Changed settings get a new numbered folder.

    Args:
        restart: train anew in a new folder although this very run is finished.
        copy_to: a second folder for runs, safe from the end of the session. Default: the mounted Google Drive, if there is one.

    Raises:
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
    backups = Path(copy_to) if copy_to else backup_dir()
    run = find_or_start(root, config.name, settings, restart, backups)
    if run.finished:
        print(f"{run.folder} already holds this very run, finished: its adapter is loaded. restart=True trains anew.")
        run.model = load_adapter(run.adapter, model)
        return run
    plan = _planned_for_now(config, plan, run)
    run.plan = _record(plan, training, validation)
    folder = checkpoints.checkpoints_of(run.folder)
    trainer = build_trainer(
        config, plan, model, tokenizer, training, validation, folder, on_oom_fallback=run.change_plan
    )
    check_before_training(trainer, config, len(training))
    stop, keeper = StopButton(), CheckpointCallback(run, backups / run.folder.name if backups else None)
    live = LiveChart(run, plan.seconds_per_step, plan.peak_bytes)
    for callback in (stop, JsonlLogger(run), live, LossGuard(), keeper):
        trainer.add_callback(callback)
    run.save()
    checkpoints.drop_incomplete(run.folder)
    with _errors_explained(run, config, plan):
        with stop.listening(), held_to_free_memory():
            _train_or_continue(run, trainer, config)
        _finish(run, trainer, stop.pressed_at)
    keeper.backup()
    return run


def build_trainer(
    config: TrainConfig,
    plan: Plan,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    training: Dataset,
    validation: Dataset,
    output_dir: str | Path,
    **trainer_settings: Any,
) -> OOMSafeTrainer:
    """TRL's trainer for a model with a fresh adapter, with fp32 adapters on every card.

    Args:
        training, validation: `prompt` and `completion` messages, or `text`. Of `validation`, the first `config.max_eval_samples` count.
        trainer_settings: what `OOMSafeTrainer` takes besides.
    """
    plan = with_working_head(config, plan)
    measured = validation.select(range(min(config.max_eval_samples, len(validation))))
    train_tokens, eval_tokens = (with_tokens(part, tokenizer, plan.seq_len) for part in (training, measured))
    use_loss_head(plan.loss_head, plan.loss_tile)
    model = attach_lora(model, config)
    arguments = sft_config(config, plan, output_dir, len(training))
    use_one_card(arguments)
    adapters = {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}
    trainer = OOMSafeTrainer(
        model=model,
        args=arguments,
        train_dataset=train_tokens,
        eval_dataset=eval_tokens,
        processing_class=tokenizer,
        full_logits=plan.loss_head == "full",
        **trainer_settings,
    )
    # TRL has just cast the adapters of a quantized model to bf16, which loses small updates and crashes fp16's gradient scaler
    # (trl#4901): back to fp32, and to the very values that they had.
    for name, weight in trainer.model.named_parameters():
        if weight.requires_grad:
            weight.data = adapters[name].to(weight.device)
    set_checkpointing(trainer.model, plan.checkpointing)
    trainer.remove_callback(PrinterCallback)
    if config.early_stopping_patience:
        trainer.add_callback(EarlyStopping(config.early_stopping_patience))
    return trainer


# --------------------------------------------------------------------------------------------------- the parts of `train`


def _record(plan: Plan, training: Dataset, validation: Dataset) -> dict[str, Any]:
    """What run.json holds of the plan: its plain values, what it promises, and how many examples it is for."""
    values: dict[str, Any] = {name: value for name, value in vars(plan).items() if isinstance(value, (str, int))}
    values |= {"card": plan.gpu.name, "device": plan.gpu.kind}
    values |= {"peak_bytes": plan.peak_bytes, "seconds_per_step": plan.seconds_per_step}
    return values | {"training_examples": len(training), "validation_examples": len(validation)}


def _train_or_continue(run: Run, trainer: OOMSafeTrainer, config: TrainConfig) -> None:
    """The loop itself: from the first step, or from the last checkpoint, or none where only the ending was left to do."""
    steps = total_steps(config, len(trainer.train_dataset))
    checkpoint = checkpoints.latest_complete(run.folder)
    if checkpoint is None:
        print(f"Training {steps} steps of {config.effective_batch_size} examples into {run.folder}")
        trainer.train()
        return
    state = checkpoints.trainer_state(checkpoint)
    waited = state["stateful_callbacks"].get("EarlyStopping", {}).get("attributes", {})
    stopped_early = 0 < config.early_stopping_patience <= waited.get("early_stopping_patience_counter", 0)
    if stopped_early or state["global_step"] >= steps:
        best = checkpoints.best_checkpoint(run.folder, state["best_global_step"]) or checkpoint
        trainer.model.load_adapter(str(best), "default")
    else:
        print(f"Continuing {run.folder} from step {state['global_step']} of {steps}")
        trainer.continue_from(checkpoint, run.history)


def _finish(run: Run, trainer: OOMSafeTrainer, stopped_at: int | None) -> None:
    """Save the best step's adapter; a run that was stopped keeps its checkpoints."""
    run.model = trainer.model
    save_adapter(run, run.model, trainer.processing_class)
    if stopped_at is None:
        run.finished = True
        shutil.rmtree(checkpoints.checkpoints_of(run.folder), ignore_errors=True)
    else:
        best = f"the best step so far ({run.best_step}) is kept"
        print(f"Stopped after step {stopped_at}; {best}. Run this cell again to go on.")
    run.save()


@contextmanager
def _errors_explained(run: Run, config: TrainConfig, plan: Plan) -> Iterator[None]:
    """Errors that end a training say what can be done, and from which checkpoint the run will go on."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"Stopped at once. {_what_stands(run)} Run this cell again to go on.")
        raise
    except TrainingStopped as error:
        fp16 = "numbers above 65504, which fp16 cannot hold. Halve the learning rate, or use a model made for fp16"
        rate = f"a learning rate ({config.learning_rate}) that is too high, or a broken example. Use a third of it"
        cause = fp16 if plan.dtype == "float16" else rate
        raise TrainingStopped(f"{error} Likely cause: {cause}. {_what_stands(run)}") from None
    except Exception as error:  # tokenizers raises nothing more special
        if is_out_of_memory(error):  # with the smallest settings, or in the optimizer, which has no smaller piece
            raise DoesNotFit(f"{suggest_alternatives(config, plan)} {_what_stands(run)}") from error
        if not any(words in str(error) for words in DISK_FULL):
            raise
        checkpoints.drop_incomplete(run.folder)
        raise TrainingStopped(
            f"The disk is full: {run.folder} could not be written. Delete old runs (helpers.runs.delete_runs) or other "
            f"files, then run this cell again. {_what_stands(run)}"
        ) from error


def _what_stands(run: Run) -> str:
    last = checkpoints.latest_complete(run.folder)
    if last is None:
        return "No checkpoint was written yet."
    return f"The checkpoint of step {checkpoints.checkpoint_step(last)} in {run.folder} stands."


# --------------------------------------------------------------------------------------------------- the plan, as it is by now


def with_working_head(config: TrainConfig, plan: Plan) -> Plan:
    """`plan` with the loss head that really works here, found out by trying it. One that needs more memory is planned anew."""
    head = plan.gpu.fused_head or working_head()
    if plan.gpu.fused_head or head == plan.loss_head:
        return plan
    gpu = replace(plan.gpu, fused_head=head)
    if head == "triton":
        print("TRL's Triton kernels work on this card: computing the loss will need less memory than planned.")
        return replace(plan, gpu=gpu, loss_head=head)
    reasons = {
        "torch": "TRL's Triton kernels do not run here",
        "full": "this version of TRL computes its loss in an unknown way",
    }
    return _planned_again(config, plan, reasons[head], gpu, plan.optimizer)


def _planned_for_now(config: TrainConfig, plan: Plan, run: Run) -> Plan:
    """`plan`; or one made anew, because the card has less memory to give by now, or because `run` was begun with another optimizer."""
    plan = with_working_head(config, plan)
    optimizer, now = run.plan.get("optimizer", plan.optimizer), detect_gpu()
    if optimizer != plan.optimizer:
        plan = _planned_again(config, plan, f"this run was begun with {optimizer}", plan.gpu, optimizer)
    if now.kind == plan.gpu.kind == "cuda" and plan.peak_bytes and now.free_bytes - plan.peak_bytes < reserve(now) / 2:
        free, planned = f"{now.free_bytes / GIB:.1f} GiB of {now.name}", f"{plan.gpu.free_bytes / GIB:.1f}"
        now = replace(now, fused_head=plan.gpu.fused_head)
        plan = _planned_again(config, plan, f"{free} are free now, {planned} when it was planned", now, optimizer)
    return plan


def _planned_again(config: TrainConfig, plan: Plan, because: str, gpu: Gpu, optimizer: str) -> Plan:
    """Another plan for what `plan` was for, printed with the reason. Raises `DoesNotFit` if nothing fits any more."""
    changed = make_plan(config, gpu, plan.model, lengths=[plan.seq_len], optimizer=optimizer)
    print(f"The plan is made anew, because {because}:\n{changed}")
    return changed

"""A trainer that is right on every card, and the run that it leaves on disk.

    run = train(config, plan, model, tokenizer, training, validation)

`build_trainer` returns TRL's own `SFTTrainer`, set up by `helpers.recipe`; `train` adds the live chart, the run folder and the
question whether this very run was already trained.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import trl.kernels.chunked_logprob as trl_kernels
import trl.trainer.utils as trl_utils
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from trl import SFTTrainer

from helpers.config import TrainConfig
from helpers.export import load_adapter, save_adapter
from helpers.live import LiveChart
from helpers.models import attach_lora
from helpers.planner import Plan
from helpers.recipe import sft_config, total_steps
from helpers.runs import HistoryWriter, Run, find_or_start


def build_trainer(
    config: TrainConfig,
    plan: Plan,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    training: Dataset,
    validation: Dataset,
    output_dir: str | Path,
) -> SFTTrainer:
    """TRL's trainer for a model with a fresh adapter.

    Args:
        training, validation: `prompt` and `completion` messages. Of `validation`, the first `config.eval_examples` are used.
    """
    use_loss_head(plan)
    trainer = SFTTrainer(
        model=attach_lora(model, config),
        args=sft_config(config, plan, output_dir, len(training)),
        train_dataset=training,
        eval_dataset=validation.select(range(min(config.eval_examples, len(validation)))),
        processing_class=tokenizer,
    )
    # TRL has just cast the adapters of a quantised model to bf16, which loses small updates and crashes fp16's gradient scaler
    # (trl#4901): back to fp32.
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(EvaluateLastStep)
    return trainer


class EvaluateLastStep(TrainerCallback):
    """Measures the last step too, which Trainer skips unless it is a multiple of `eval_steps`."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        if state.global_step >= state.max_steps:
            control.should_evaluate = True


def use_loss_head(plan: Plan) -> None:
    """Make TRL's loss head run as planned: which kernels, how large a tile, and only where a token is trained.

    Without Triton, TRL 1.16 projects every position to the whole vocabulary, prompts included, and masks afterwards. On two
    CPU cores, a step of the embedded model is a fifth faster and needs a gigabyte less without that; the loss is the same.
    """
    trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE = plan.loss_tile
    if hasattr(trl_utils, "_use_triton"):  # private, so it may go: then training is only slower
        trl_utils._use_triton = lambda device: True
    trl_kernels._use_triton = lambda device: plan.loss_head == "triton" and device.type == "cuda"


def train(
    config: TrainConfig,
    plan: Plan,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    training: Dataset,
    validation: Dataset,
    *,
    again: bool = False,
    root: str | Path = "runs",
) -> Run:
    """Train, show it live, keep the best step's adapter, and return the `Run`.

    The same settings, model and data that were already trained give the finished run back; `again=True` trains anew in a new
    folder. Changed settings get a new numbered folder.
    """
    settings = config.to_dict() | {"model": plan.model, "data_sha256": _fingerprint(training, validation)}
    run = find_or_start(root, config.name, settings, again)
    if run.finished:
        print(f"{run.folder} already holds this very run, finished: its adapter is loaded. again=True trains anew.")
        run.model = load_adapter(run.adapter, model)
        return run

    run.save()
    print(f"Training {total_steps(config, len(training))} steps of {config.effective_batch_size} examples into {run.folder}")
    trainer = build_trainer(config, plan, model, tokenizer, training, validation, run.folder / "checkpoints")
    trainer.add_callback(HistoryWriter(run))
    trainer.add_callback(LiveChart(run, plan.seconds_per_step))
    trainer.train()

    run.model = trainer.model
    save_adapter(run, run.model, tokenizer)
    run.finished = True
    run.save()
    shutil.rmtree(run.folder / "checkpoints", ignore_errors=True)
    return run


def _fingerprint(*parts: Dataset) -> str:
    """SHA-256 of the examples themselves, so that an edited data file is another run."""
    digest = hashlib.sha256()
    for part in parts:
        for example in part:
            digest.update(json.dumps(example, sort_keys=True).encode())
    return digest.hexdigest()

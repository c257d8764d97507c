"""TRL's `SFTTrainer`, with three things that a free notebook needs.

- Validation loss is the mean over all trained tokens, so it does not depend on the evaluation's batch size.
- Running out of memory is answered, not raised: the optimizer step is computed again in smaller pieces, with the same result.
- A loss that is not a number stops the run before it reaches the weights.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTTrainer
from trl.models.activation_offloading import get_act_offloading_ctx_manager

from helpers.callbacks import TrainingStopped
from helpers.checkpoints import step_of
from helpers.compat import forget_foreign_scaler, get_checkpointing, set_checkpointing
from helpers.runs import History

Batch = dict[str, Any]
IGNORED = -100  # label of a token that is not trained


class OOMSafeTrainer(SFTTrainer):
    """`SFTTrainer` that survives running out of memory.

    Args:
        on_oom_fallback: called with the settings that changed (`{"micro_batch": 2}`), so that they can be kept for later.
        on_oom_exhausted: called when nothing smaller is left; returns the error to raise.
        likely_cause: what to say if the loss stops being a number.
        full_logits: compute the loss of all logits at once, as transformers does, instead of by TRL's head.
    """

    def __init__(
        self,
        *args: Any,
        on_oom_fallback: Callable[[dict[str, Any]], None] = lambda changes: None,
        on_oom_exhausted: Callable[[], Exception] | None = None,
        likely_cause: str = "",
        full_logits: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.rows = self.args.per_device_train_batch_size  # examples that go through the model at once
        self.eval_rows = self.args.per_device_eval_batch_size
        self.on_oom_fallback = on_oom_fallback
        self.on_oom_exhausted = on_oom_exhausted
        self.likely_cause = likely_cause
        self.full_logits = full_logits
        self._offloads = self.args.activation_offloading
        self._batches_of_step: list[Batch] = []
        self._token_losses: list[tuple[float, int]] = []

    # ----------------------------------------------------------------------------------------------- training

    def continue_from(self, checkpoint: Path, history: History) -> None:
        """Go on from a checkpoint: weights, optimizer, scheduler, scaler, random numbers, place in the data, patience."""
        self.args.eval_on_start = False  # the untrained model was measured when the run began
        self.args.restore_callback_states_from_checkpoint = True
        counted = [
            event["num_tokens"] for event in history if "num_tokens" in event and event["step"] <= step_of(checkpoint)
        ]
        self._total_train_tokens = counted[-1] if counted else 0
        forget_foreign_scaler(self)
        self.train(resume_from_checkpoint=str(checkpoint))

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Batch], torch.Tensor | int | None]:
        self._batches_of_step = []
        self._counted = self._total_train_tokens, {name: len(values) for name, values in self._metrics["train"].items()}
        return super().get_batch_samples(*args, **kwargs)

    def compute_loss(self, model: torch.nn.Module, inputs: Batch, *args: Any, **kwargs: Any) -> Any:
        """TRL's loss, or transformers' own with all logits at once, where TRL's head is not what was planned for."""
        trainer = super(SFTTrainer, self) if self.full_logits else super()
        return trainer.compute_loss(model, inputs, *args, **kwargs)

    def training_step(self, model: torch.nn.Module, inputs: Batch, num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward of one micro-batch. Out of memory: this step's micro-batches so far are done again, in halves.

        The loss is a sum over tokens divided by the tokens of the whole step, so pieces of any size add up to the same gradient.
        """
        self._batches_of_step.append(inputs)
        todo = [inputs]
        while True:
            try:
                losses = [
                    [
                        super(OOMSafeTrainer, self).training_step(model, piece, num_items_in_batch)
                        for piece in _pieces(batch, self.rows)
                    ]
                    for batch in todo
                ]
                break
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            # Only here is the exception gone, and with it the activations that its traceback held.
            model.zero_grad()
            self._forget_counts()
            self._make_room()
            todo = self._batches_of_step
        loss = torch.stack(losses[-1]).sum()
        if not torch.isfinite(loss):
            self.log({"loss": loss.item()})
            raise TrainingStopped(
                f"The training loss at step {self.state.global_step + 1} is not a number. {self.likely_cause}"
            )
        return loss

    def _forget_counts(self) -> None:
        """Tokens and accuracies that TRL has counted in this step will be counted again."""
        self._total_train_tokens, lengths = self._counted
        for name, values in self._metrics["train"].items():
            del values[lengths.get(name, 0) :]

    def _make_room(self) -> None:
        """Free what is free, then change the one setting that costs least: halves, checkpointing, offloading."""
        _free()
        if self.rows > 1:
            self.rows = -(-self.rows // 2)
            changes, what = {"micro_batch": self.rows}, f"examples now go through the model {self.rows} at a time"
        elif get_checkpointing(self.model) != "on":
            set_checkpointing(self.model, "on")
            changes, what = {"checkpointing": "on"}, "checkpointing is now on"
        elif not self._offloads and torch.cuda.is_available():
            self._offloads = True
            self.maybe_activation_offload_context = get_act_offloading_ctx_manager(model=self.model)
            changes, what = {"offload": True}, "activations now wait in host memory"
        else:
            raise (
                self.on_oom_exhausted()
                if self.on_oom_exhausted
                else TrainingStopped("Out of memory with the smallest settings.")
            )
        self.on_oom_fallback(changes)
        print(
            f"Out of memory in step {self.state.global_step + 1}: {what}. The step is done again; the result is the same."
        )

    # ----------------------------------------------------------------------------------------------- evaluation

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        self._token_losses = []
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        tokens = sum(count for _, count in self._token_losses)
        if tokens:
            output.metrics[f"{metric_key_prefix}_loss"] = (
                sum(loss * count for loss, count in self._token_losses) / tokens
            )
        return output

    def prediction_step(
        self, model: torch.nn.Module, inputs: Batch, prediction_loss_only: bool, *args: Any, **kwargs: Any
    ) -> tuple:
        """The loss of one evaluation batch; too large a batch is halved until it fits, and the smaller size is kept."""
        while True:
            try:
                results = [
                    (
                        super(OOMSafeTrainer, self).prediction_step(
                            model, piece, prediction_loss_only, *args, **kwargs
                        ),
                        _tokens(piece),
                    )
                    for piece in _pieces(inputs, self.eval_rows)
                ]
                break
            except RuntimeError as error:
                if not is_out_of_memory(error) or self.eval_rows == 1:
                    raise
            _free()
            self.eval_rows = -(-self.eval_rows // 2)
            self.on_oom_fallback({"eval_batch": self.eval_rows})
            print(f"Out of memory while evaluating: {self.eval_rows} at a time from now on. The loss is the same.")
        self._token_losses += [(result[0].item(), tokens) for result, tokens in results]
        return results[-1][0]


def _pieces(batch: Batch, rows: int) -> Iterator[Batch]:
    """The batch in parts of at most `rows` examples; as it is if it is small enough."""
    total = len(batch["input_ids"])
    for start in range(0, total, rows):
        yield {
            name: value[start : start + rows]
            if torch.is_tensor(value) and value.ndim and len(value) == total
            else value
            for name, value in batch.items()
        }


def _tokens(batch: Batch) -> int:
    """How many tokens count in the loss. The first token of a row is never predicted."""
    return int((batch["labels"][:, 1:] != IGNORED).sum())


def is_out_of_memory(error: Exception) -> bool:
    """Is this the card's memory running out? cuBLAS says it in its own way when it finds none for its workspace."""
    said = str(error)
    return (
        isinstance(error, torch.OutOfMemoryError)
        or should_reduce_batch_size(error)
        or "out of memory" in said
        or "CUBLAS_STATUS_ALLOC_FAILED" in said
    )


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

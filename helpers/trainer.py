"""TRL's `SFTTrainer`, with three things that a free notebook needs.

- Validation loss is the mean over all trained tokens, so it does not depend on the evaluation's batch size.
- Running out of memory is answered, not raised: the optimizer step is computed again in smaller pieces, with the same result.
- A loss that is not a number stops the run before it reaches the weights.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTTrainer
from trl.models.activation_offloading import get_act_offloading_ctx_manager

from helpers.callbacks import TrainingStopped
from helpers.checkpoints import checkpoint_step
from helpers.compat import forget_foreign_scaler, get_checkpointing, get_counts, set_checkpointing, set_counts
from helpers.data.tokens import MASKED
from helpers.models import free_memory
from helpers.runs import History

Batch = dict[str, Any]


class OOMSafeTrainer(SFTTrainer):
    """`SFTTrainer` that survives running out of memory. With nothing smaller left, it raises `torch.OutOfMemoryError` like others.

    Args:
        on_oom_fallback: called with the settings that changed (`{"micro_batch": 2}`), so that they can be written down.
        full_logits: compute the loss of all logits at once, as transformers does, instead of by TRL's head.
    """

    def __init__(
        self,
        *args: Any,
        on_oom_fallback: Callable[[dict[str, Any]], None] = lambda changes: None,
        full_logits: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.rows = self.args.per_device_train_batch_size  # examples that go through the model at once
        self.eval_rows = self.args.per_device_eval_batch_size
        self.on_oom_fallback = on_oom_fallback
        self.full_logits = full_logits
        self._offloads = self.args.activation_offloading
        self._batches_of_step: list[Batch] = []
        self._token_losses: list[tuple[float, int]] = []  # of an evaluation: mean loss of a piece, its trained tokens

    # ----------------------------------------------------------------------------------------------- training

    def continue_from(self, checkpoint: Path, history: History) -> None:
        """Go on from a checkpoint: weights, optimizer, scheduler, scaler, random numbers, place in the data, patience."""
        self.args.eval_on_start = False  # the untrained model was measured when the run began
        self.args.restore_callback_states_from_checkpoint = True
        step = checkpoint_step(checkpoint)
        tokens = max((event.get("num_tokens", 0) for event in history if event["step"] <= step), default=0)
        set_counts(self, (tokens, {}))
        forget_foreign_scaler(self)
        self.train(resume_from_checkpoint=str(checkpoint))

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Batch], torch.Tensor | int | None]:
        """The micro-batches of the next optimizer step, which begins here."""
        self._batches_of_step = []
        self._counts_before_step = get_counts(self)
        return super().get_batch_samples(*args, **kwargs)

    def compute_loss(self, model: torch.nn.Module, inputs: Batch, *args: Any, **kwargs: Any) -> Any:
        """TRL's loss, or transformers' own with all logits at once, where TRL's head is not what was planned for."""
        trainer: Any = super(SFTTrainer, self) if self.full_logits else super()
        return trainer.compute_loss(model, inputs, *args, **kwargs)

    def training_step(self, model: torch.nn.Module, inputs: Batch, num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward of one micro-batch. Out of memory: this step's micro-batches so far are done again, in halves.

        The loss is a sum over tokens divided by the tokens of the whole step, so pieces of any size add up to the same gradient.
        """
        self._batches_of_step.append(inputs)
        todo = [inputs]
        while True:
            try:
                for batch in todo:
                    loss = self._step_in_pieces(model, batch, num_items_in_batch)
                break
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            # Only here is the exception gone, and with it the activations that its traceback held.
            model.zero_grad()
            set_counts(self, self._counts_before_step)
            self._use_less_memory()
            todo = self._batches_of_step
        if not torch.isfinite(loss):
            self.log({"loss": loss.item()})
            raise TrainingStopped(f"The training loss at step {self.state.global_step + 1} is not a number.")
        return loss

    def _step_in_pieces(self, model: torch.nn.Module, batch: Batch, num_items_in_batch: Any) -> torch.Tensor:
        losses = []
        for piece in _pieces(batch, self.rows):
            losses.append(super().training_step(model, piece, num_items_in_batch))
        return torch.stack(losses).sum()

    def _use_less_memory(self) -> None:
        """Free what is free, then change the one setting that costs least: halves, checkpointing, offloading."""
        free_memory()
        if self.rows > 1:
            self.rows = -(-self.rows // 2)
            self._fall_back("micro_batch", self.rows)
        elif get_checkpointing(self.model) != "on":
            set_checkpointing(self.model, "on")
            self._fall_back("checkpointing", "on")
        elif not self._offloads and torch.cuda.is_available():
            self._offloads = True
            self.maybe_activation_offload_context = get_act_offloading_ctx_manager(model=self.model)
            self._fall_back("offload", True)
        else:
            raise torch.OutOfMemoryError("Out of memory with the smallest settings.")

    def _fall_back(self, setting: str, value: Any) -> None:
        self.on_oom_fallback({setting: value})
        after = f"after step {self.state.global_step}"
        print(f"Out of memory {after}: {setting}={value} from now on. What failed is done again, with the same result.")

    # ----------------------------------------------------------------------------------------------- evaluation

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """Evaluate, and weigh each batch's mean loss by its trained tokens."""
        self._token_losses = []
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        tokens = sum(count for _, count in self._token_losses)
        if tokens:
            total = sum(loss * count for loss, count in self._token_losses)
            output.metrics[f"{metric_key_prefix}_loss"] = total / tokens
        return output

    def prediction_step(self, model: torch.nn.Module, inputs: Batch, *args: Any, **kwargs: Any) -> tuple:
        """The loss of one evaluation batch; too large a batch is halved until it fits, and the smaller size is kept."""
        while True:
            try:
                done = []
                for piece in _pieces(inputs, self.eval_rows):
                    result = super().prediction_step(model, piece, *args, **kwargs)
                    done.append((result[0].item(), _trained_tokens(piece)))
                break
            except RuntimeError as error:
                if not is_out_of_memory(error) or self.eval_rows == 1:
                    raise
            free_memory()
            self.eval_rows = -(-self.eval_rows // 2)
            self._fall_back("eval_batch", self.eval_rows)
        self._token_losses += done
        return result


def _pieces(batch: Batch, rows: int) -> Iterator[Batch]:
    """The batch in parts of at most `rows` examples; as it is if it is small enough."""
    total = len(batch["input_ids"])
    per_example = {name for name, value in batch.items() if torch.is_tensor(value) and value.shape[:1] == (total,)}
    for start in range(0, total, rows):
        part = slice(start, start + rows)
        yield {name: value[part] if name in per_example else value for name, value in batch.items()}


def _trained_tokens(batch: Batch) -> int:
    """How many tokens count in the loss. The first token of a row is never predicted."""
    return int((batch["labels"][:, 1:] != MASKED).sum())


def is_out_of_memory(error: Exception) -> bool:
    """Is this the card's memory running out? cuBLAS says it in its own way when it finds none for its workspace."""
    said = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    known = isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)
    return known or any(words in str(error) for words in said)


@contextmanager
def held_to_free_memory(system: str = sys.platform) -> Iterator[None]:
    """On Windows, make it an error, which the trainer answers, that PyTorch takes more than what is free on the card now.

    Without this, the driver there moves what does not fit into system RAM, and training gets many times slower without a word.
    PyTorch's limit is on what its allocator reserves; the CUDA context is outside it, and taken already when what is free is asked.
    """
    if system != "win32" or not torch.cuda.is_available():
        yield
        return
    free, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved() + free) / total))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)

"""TRL's `SFTTrainer`, with four things that a free notebook needs.

- It gets an optimizer step's examples at once, and cuts them into the micro-batches that take the least time (`helpers.cutting`).
- Running out of memory is answered, not raised: the optimizer step is computed again in smaller pieces, with the same result.
- Validation loss is the mean over all trained tokens, so it does not depend on how the examples are cut.
- A loss that is not a number stops the run before it reaches the weights.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTTrainer
from trl.models.activation_offloading import get_act_offloading_ctx_manager

from helpers.callbacks import TrainingStopped
from helpers.checkpoints import checkpoint_step
from helpers.compat import count_once, forget_foreign_scaler, get_counts, set_checkpointing, set_counts
from helpers.cutting import Mode, Piece, cut, quickest
from helpers.data.tokens import MASKED
from helpers.models import free_memory
from helpers.runs import History

Batch = dict[str, Any]
# (checkpointing, offload) for one example at a time, where nothing else is left, and so expensive that nothing else runs that way.
LAST_RESORTS, LAST_RESORT_SECONDS = [("on", False), ("on", True)], 1e6


class OOMSafeTrainer(SFTTrainer):
    """`SFTTrainer` that takes a step at once and survives running out of memory. With nothing smaller left, it raises `torch.OutOfMemoryError`.

    Its arguments are those of `recipe.sft_kwargs(..., cut="tokens")`: a batch is the whole optimizer step.

    Args:
        modes: how the micro-batches of a step may run.
        eval_mode: how those of an evaluation run.
        on_oom_fallback: called with the settings that changed (`{"micro_batch": 2}`), so that they can be written down.
        full_logits: compute the loss of all logits at once, as transformers does, instead of by TRL's head.
    """

    def __init__(
        self,
        *args: Any,
        modes: list[Mode],
        eval_mode: Mode,
        on_oom_fallback: Callable[[dict[str, Any]], None] = lambda changes: None,
        full_logits: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.modes, self.eval_modes = modes, [eval_mode]
        self.on_oom_fallback = on_oom_fallback
        self.full_logits = full_logits
        self._runs_in: tuple[str, bool] | None = None  # checkpointing, offload; None: not set yet
        self._offloading: Any = None  # TRL's context, once it was needed
        self._real_tokens = self._computed_tokens = 0  # since the last training loss was logged
        self._logged_at = 0.0  # or rather when the step after that began, by time.perf_counter()
        self._token_losses: list[tuple[float, int]] = []  # of an evaluation: mean loss of a batch, its trained tokens

    def compute_loss(self, model: torch.nn.Module, inputs: Batch, *args: Any, **kwargs: Any) -> Any:
        """TRL's loss, or transformers' own with all logits at once, where TRL's head is not what was planned for."""
        trainer: Any = super(SFTTrainer, self) if self.full_logits else super()
        return trainer.compute_loss(model, inputs, *args, **kwargs)

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
        """The examples of the next optimizer step, which begins here."""
        if not self._computed_tokens:
            self._logged_at = time.perf_counter()
        return super().get_batch_samples(*args, **kwargs)

    def training_step(self, model: torch.nn.Module, inputs: Batch, num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward of a whole optimizer step, piece by piece. Out of memory: all of it again, in smaller ones.

        The loss is a sum over tokens divided by the tokens of the whole step, so pieces of any size add up to the same gradient.
        """

        def run(piece: Batch) -> torch.Tensor:
            return super(OOMSafeTrainer, self).training_step(model, piece, num_items_in_batch)

        done = self._in_pieces(inputs, self.modes, run)
        loss = torch.stack([loss for loss, _ in done]).sum()
        if not torch.isfinite(loss):
            self.log({"loss": loss.item()})
            raise TrainingStopped(f"The training loss at step {self.state.global_step + 1} is not a number.")
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log; beside a training loss, how quickly its steps were trained: tokens per second, and padding as a share of what was computed."""
        if "loss" in logs and self._computed_tokens:
            seconds = time.perf_counter() - self._logged_at
            logs["tokens_per_second"] = round(self._real_tokens / seconds, 1)
            logs["padding"] = round(1 - self._real_tokens / self._computed_tokens, 4)
            self._real_tokens = self._computed_tokens = 0
        super().log(logs, *args, **kwargs)

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
        """The loss of one evaluation batch, piece by piece. Out of memory: again, in smaller ones."""

        def run(piece: Batch) -> torch.Tensor:
            return super(OOMSafeTrainer, self).prediction_step(model, piece, *args, **kwargs)[0]

        done = self._in_pieces(inputs, self.eval_modes, run)
        self._token_losses += [(loss.item(), tokens) for loss, tokens in done]
        return done[0][0], None, None  # `evaluation_loop` looks at all of them

    # ----------------------------------------------------------------------------------------------- pieces

    def _in_pieces(
        self, batch: Batch, modes: list[Mode], run: Callable[[Batch], torch.Tensor]
    ) -> list[tuple[torch.Tensor, int]]:
        """(loss, trained tokens) of each micro-batch that `batch` is cut into. Out of memory: lowers `modes`, and does all of them again."""
        lengths: list[int] = batch["attention_mask"].sum(1).tolist()
        trained: list[int] = (batch["labels"][:, 1:] != MASKED).sum(1).tolist()  # the first token is never predicted
        phase = "train" if modes is self.modes else "eval"
        counts = get_counts(self, phase)
        while True:
            losses, pieces = [], cut(lengths, modes)
            self.current_gradient_accumulation_steps = len(pieces)
            try:
                for piece in pieces:
                    self._run_in(modes[piece.mode])
                    losses.append(run(_part(batch, piece)))
                break
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            # Only here is the exception gone, and with it the activations that its traceback held.
            self.model.zero_grad()
            set_counts(self, counts, phase)
            free_memory()
            self._use_less_memory(modes, piece)
        tokens = [sum(trained[example] for example in piece.examples) for piece in pieces]
        count_once(self, counts, tokens, phase)
        if phase == "train":
            self._real_tokens += sum(lengths)
            self._computed_tokens += sum(len(piece.examples) * piece.longest for piece in pieces)
        return list(zip(losses, tokens))

    def _run_in(self, mode: Mode) -> None:
        """Have the model run in this mode from now on."""
        if self._runs_in == (mode.checkpointing, mode.offload):
            return
        set_checkpointing(self.model, mode.checkpointing)
        if mode.offload and self._offloading is None:  # only once, because it leaves hooks on the model
            self._offloading = get_act_offloading_ctx_manager(model=self.model)
        self.maybe_activation_offload_context = self._offloading if mode.offload else nullcontext()
        self._runs_in = (mode.checkpointing, mode.offload)

    def _use_less_memory(self, modes: list[Mode], failed: Piece) -> None:
        """Lower the mode in which a piece failed. Where no mode takes even one such example any more, take a last resort."""
        before = modes[failed.mode]
        modes[failed.mode] = before.halved(len(failed.examples), failed.longest)
        room = [mode for mode in (modes[failed.mode], *modes) if mode.most_examples(failed.longest)]
        if not room:
            tried = [(mode.checkpointing, mode.offload) for mode in modes]
            left = [each for each in LAST_RESORTS if each not in tried and (torch.cuda.is_available() or not each[1])]
            if modes is not self.modes or not left:
                raise torch.OutOfMemoryError("Out of memory with the smallest settings.")
            room = [Mode(*left[0], ((self.args.max_length, 1),), LAST_RESORT_SECONDS, 1.0)]
            modes += room
        longest = self.args.max_length
        if modes is self.modes:
            mode, rows = quickest(modes, longest)
            self.on_oom_fallback({"micro_batch": rows, "checkpointing": mode.checkpointing, "offload": mode.offload})
        else:
            self.on_oom_fallback({"eval_batch": max(1, modes[0].most_examples(longest))})
        print(
            f"Out of memory after step {self.state.global_step}: {len(failed.examples)} x {failed.longest} tokens, {before}. From now on "
            f"at most {room[0].most_examples(failed.longest)} x {failed.longest}, {room[0]}. What failed is done again, with the same result."
        )


def _part(batch: Batch, piece: Piece) -> Batch:
    """The examples of a piece, without columns that are padding in all of them."""
    whole, rows = batch["input_ids"].shape, list(piece.examples)
    return {
        name: value[rows, : piece.longest] if torch.is_tensor(value) and value.shape == whole else value
        for name, value in batch.items()
    }


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

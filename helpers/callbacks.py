"""What happens between two optimizer steps: measure, write down, keep, stop. Each callback has one job.

Trainer calls them in the order in which `helpers.train` adds them.
"""

from __future__ import annotations

import json
import math
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import torch
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from helpers import checkpoints
from helpers.runs import Run

SPILL_SLOWDOWN = 3  # a step this many times slower than planned
SKIPPED_STEPS_IN_A_ROW = 10  # fp16's loss scale halves at each: ten divide it by a thousand


class TrainingStopped(RuntimeError):
    """Training cannot go on. The message says at which step, the likely cause, and which checkpoint stands."""


class EarlyStopping(EarlyStoppingCallback):
    """transformers' own: stops after `early_stopping_patience` evaluations in a row without a new best. Step 0 does not count."""

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step > 0:
            super().on_evaluate(args, state, control, **kwargs)


class JsonlLogger(TrainerCallback):
    """Appends every log event to `history.jsonl` and to the list that the chart draws from.

    A continued run writes the steps after its checkpoint anew, so their old rows go: each step is there once.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.started_at = 0.0
        self.peak_bytes = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        done = state.global_step
        kept = [event for event in self.run.history if done and event["step"] <= done and "train_runtime" not in event]
        self.run.history[:] = kept
        checkpoints.atomic_write(self._file, "".join(json.dumps(event) + "\n" for event in kept))
        self.started_at = time.monotonic() - self.run.seconds
        self.peak_bytes = self.run.peak_bytes
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **kwargs: Any
    ) -> None:
        self.peak_bytes = max(self.peak_bytes, peak_memory())
        event = {"step": state.global_step, **logs}
        event |= {"seconds": round(time.monotonic() - self.started_at, 3), "peak_bytes": self.peak_bytes}
        event = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in event.items()
        }
        self.run.history.append(event)
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")

    @property
    def _file(self) -> Path:
        return self.run.folder / "history.jsonl"


def peak_memory() -> int:
    """Bytes: the most that PyTorch has reserved on the card, or what this process holds in RAM right now."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved()
    return psutil.Process().memory_info().rss


class CheckpointCallback(TrainerCallback):
    """After Trainer has written a checkpoint: make it whole, let the older ones go, and copy the run to a second place."""

    def __init__(self, run: Run, backup_dir: Path | None = None) -> None:
        self.run = run
        self.backup_dir = backup_dir  # the folder of this run there

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        best = checkpoints.best_checkpoint(self.run.folder, state.best_global_step)
        state.best_model_checkpoint = str(best) if best else None  # the path on this machine

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        checkpoints.seal(checkpoints.checkpoints_of(self.run.folder) / f"checkpoint-{state.global_step}")
        checkpoints.keep(self.run.folder, state.best_global_step)
        self.copy()

    def copy(self) -> None:
        """Mirror the run; an error there is told once and ends the mirroring, not the training."""
        if self.backup_dir is None:
            return
        try:
            checkpoints.mirror(self.run.folder, self.backup_dir)
        except OSError as error:
            print(f"[WARN] the copy of this run in {self.backup_dir} failed ({error}); training goes on without it.")
            self.backup_dir = None


class LossGuard(TrainerCallback):
    """Stops when the numbers have stopped meaning anything: a validation loss that is no number, or fp16 that only skips steps."""

    def __init__(self, likely_cause: str) -> None:
        self.likely_cause = likely_cause
        self.skipped = 0

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        self.skipped = self.skipped + 1 if getattr(optimizer, "step_was_skipped", False) else 0
        if self.skipped >= SKIPPED_STEPS_IN_A_ROW:
            raise TrainingStopped(
                f"The gradients overflowed fp16 in {self.skipped} steps in a row, up to step {state.global_step}. {self.likely_cause}"
            )

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **kwargs: Any,
    ) -> None:
        if not math.isfinite(metrics.get("eval_loss", 0.0)):
            raise TrainingStopped(
                f"The validation loss at step {state.global_step} is not a number. {self.likely_cause}"
            )


class SpillWarning(TrainerCallback):
    """On Windows, the driver moves what does not fit the card into system RAM, and training gets many times slower without an error.

    Args:
        free_bytes: what the card had free before training.
        planned_seconds: per step, by the plan.
    """

    def __init__(self, free_bytes: int, planned_seconds: float | None, windows: bool = sys.platform == "win32") -> None:
        self.free_bytes = free_bytes
        self.planned_seconds = planned_seconds
        self.watching = windows
        self.step_began = 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.step_began = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        seconds = time.monotonic() - self.step_began
        allocated = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        slow = (
            self.planned_seconds is not None
            and state.global_step > 2
            and seconds > SPILL_SLOWDOWN * self.planned_seconds
        )
        if self.watching and (allocated > self.free_bytes or slow):
            self.watching = False
            why = (
                f"a step took {seconds:.0f} s, planned were {self.planned_seconds:.0f}"
                if slow
                else "more is allocated than was free"
            )
            print(
                f"[WARN] The card's memory seems to spill into system RAM ({why}). Close what uses the card, or lower max_length."
            )


class StopButton(TrainerCallback):
    """The notebook's own stop button (or Ctrl-C): once finishes the step and saves, twice stops at once.

    `pressed_at` is the step after which training stopped, or None.
    """

    def __init__(self) -> None:
        self.presses = 0
        self.pressed_at: int | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While this is open, an interrupt does not fall into the middle of a step. Only the main thread can listen."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGINT, self._press)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _press(self, number: int, frame: FrameType | None) -> None:
        self.presses += 1
        if self.presses > 1:
            raise KeyboardInterrupt
        print(
            "\nStopping: this step is finished, measured and saved first. Press stop again to stop at once.",
            file=sys.stderr,
        )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.presses and state.global_step < state.max_steps:
            self.pressed_at = state.global_step
            # Measured, written down and saved: so the step that is said to be kept is the one whose adapter is kept.
            control.should_training_stop = control.should_evaluate = control.should_log = control.should_save = True

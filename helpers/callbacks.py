"""What happens between two optimizer steps: measure, write down, keep, stop. Trainer calls these in the order in which they are added."""

from __future__ import annotations

import json
import math
import shutil
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
from transformers import TrainerCallback, TrainerControl, TrainerState

from helpers import checkpoints
from helpers.files import atomic_write
from helpers.runs import HISTORY, RECORD, Run

SKIPPED_STEPS_IN_A_ROW = 10  # fp16's loss scale halves at each: ten divide it by a thousand


class TrainingStopped(RuntimeError):
    """Training cannot go on. The message says at which step, the likely cause, and which checkpoint stands."""


class JsonlLogger(TrainerCallback):
    """Appends every log event to `history.jsonl` and to the list that the chart draws from."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.file = run.folder / HISTORY
        self.started_at = 0.0
        self.peak_bytes = 0

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Drop the rows of steps after the checkpoint: they are trained and written anew, so each step is there once."""
        done = state.global_step
        kept = [event for event in self.run.history if done and event["step"] <= done and "train_runtime" not in event]
        self.run.history[:] = kept
        atomic_write(self.file, "".join(json.dumps(event) + "\n" for event in kept))
        self.started_at = time.monotonic() - self.run.seconds
        self.peak_bytes = self.run.peak_bytes
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add one row. A number that is none becomes null, which JSON can hold. Memory: what PyTorch took of the card, or all of the RAM."""
        on_card = torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0
        self.peak_bytes = max(self.peak_bytes, on_card or psutil.Process().memory_info().rss)
        measured = {"seconds": round(time.monotonic() - self.started_at, 3), "peak_bytes": self.peak_bytes}
        event = {"step": state.global_step} | kwargs["logs"] | measured
        event |= {key: None for key, value in event.items() if isinstance(value, float) and not math.isfinite(value)}
        self.run.history.append(event)
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")


class CheckpointCallback(TrainerCallback):
    """After Trainer has written a checkpoint: mark it complete, let the older ones go, and back the run up in a second place."""

    def __init__(self, run: Run, backup_folder: Path | None = None) -> None:
        self.run = run
        self.backup_folder = backup_folder

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Find the best checkpoint where it lies on this machine."""
        best = checkpoints.best_checkpoint(self.run.folder, state.best_global_step)
        state.best_model_checkpoint = str(best) if best else None

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Trainer has written everything: with a copy of the record beside it, the checkpoint counts, so older ones may go."""
        folder = checkpoints.checkpoints_of(self.run.folder) / f"checkpoint-{state.global_step}"
        shutil.copyfile(self.run.folder / RECORD, folder / RECORD)
        checkpoints.mark_complete(folder)
        checkpoints.keep(self.run.folder, state.best_global_step)
        self.backup()

    def backup(self) -> None:
        """Copy the run; an error there is told once and ends the copying, not the training."""
        if self.backup_folder is None:
            return
        try:
            checkpoints.backup(self.run.folder, self.backup_folder)
        except OSError as error:
            print(f"[WARN] the copy of this run in {self.backup_folder} failed ({error}); training goes on without it.")
            self.backup_folder = None


class LossGuard(TrainerCallback):
    """Stops when the numbers have stopped meaning anything: a validation loss that is no number, or fp16 that only skips steps."""

    def __init__(self) -> None:
        self.skipped = 0

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Count the steps in a row whose gradients overflowed fp16."""
        self.skipped = self.skipped + 1 if getattr(kwargs["optimizer"], "step_was_skipped", False) else 0
        if self.skipped >= SKIPPED_STEPS_IN_A_ROW:
            where = f"{self.skipped} steps in a row, up to step {state.global_step}"
            raise TrainingStopped(f"The gradients overflowed fp16 in {where}.")

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop at a validation loss that is no number. The training loss is `OOMSafeTrainer`'s to look at."""
        if not math.isfinite(kwargs["metrics"].get("eval_loss", 0.0)):
            raise TrainingStopped(f"The validation loss at step {state.global_step} is not a number.")


class StopButton(TrainerCallback):
    """The notebook's own stop button (or Ctrl-C): once finishes the step and saves, twice stops at once. `pressed_at`: the step, or None."""

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
        first = "this step is finished, measured and saved first. Press again to stop at once."
        print(f"\nStopping: {first}", file=sys.stderr)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure, write down and save this step, so that the step that is said to be kept is the one whose adapter is kept."""
        if self.presses and state.global_step < state.max_steps:
            self.pressed_at = state.global_step
            control.should_training_stop = control.should_evaluate = control.should_log = control.should_save = True

"""What is seen while a model trains: one chart that redraws in place, or lines of text where there is no notebook.

One display handle is updated with a PNG. That works in Colab, JupyterLab, Notebook 7, VS Code, Kaggle and nbclient, and it
neither flickers nor leaves a trail of old charts.
"""

from __future__ import annotations

import io
import time
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from helpers.charts import loss_chart
from helpers.runs import Run

SECONDS_BETWEEN_REDRAWS = 1.5
MEASURED_STEPS = 10  # after so many real steps their own time replaces the plan's


def has_notebook() -> bool:
    """True inside a Jupyter kernel (which can update what it has displayed), False in a terminal or a script."""
    try:
        from IPython import get_ipython
    except ImportError:
        return False
    return getattr(get_ipython(), "kernel", None) is not None


class LiveChart(TrainerCallback):
    """Redraws the loss chart of `run` after log events; without a notebook it prints a line for each instead."""

    def __init__(self, run: Run, planned_seconds: float | None = None) -> None:
        self.run = run
        self.planned_seconds = planned_seconds  # per step, by the plan; real steps replace it
        self.handle: Any = None
        self.drawn_at = self.started_at = 0.0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.started_at = time.monotonic()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **kwargs: Any
    ) -> None:
        if not has_notebook():
            if "loss" in logs or "eval_loss" in logs:
                print(self._line(state, logs), flush=True)
        elif "eval_loss" in logs or time.monotonic() - self.drawn_at > SECONDS_BETWEEN_REDRAWS:
            self._draw(state)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if has_notebook():
            self._draw(state)

    def _line(self, state: TrainerState, logs: dict[str, Any]) -> str:
        shown = {"loss": "training loss", "eval_loss": "validation loss"}
        losses = ", ".join(f"{label} {logs[key]:.3f}" for key, label in shown.items() if key in logs)
        return f"step {state.global_step:>4}/{state.max_steps}  {losses}  {self._time_left(state)}"

    def _time_left(self, state: TrainerState) -> str:
        """By the plan until ten steps are done (if it knows this card), from then on by what the steps really took."""
        remaining, spent = state.max_steps - state.global_step, time.monotonic() - self.started_at
        if state.global_step < MEASURED_STEPS and self.planned_seconds is not None:
            return f"{spent / 60:.1f} min so far, about {remaining * self.planned_seconds / 60:.1f} min left by the plan, not yet measured"
        if not state.global_step:
            return "before the first step"
        left = spent / state.global_step * remaining
        return f"{spent / 60:.1f} min so far, about {left / 60:.1f} min left" if left > 0 else f"{spent / 60:.1f} min"

    def _draw(self, state: TrainerState) -> None:
        from IPython.display import Image, display

        title = f"step {state.global_step} of {state.max_steps}  ·  {self._time_left(state)}"
        buffer = io.BytesIO()
        loss_chart(self.run.history, state.max_steps, title).savefig(buffer, format="png")
        picture = Image(buffer.getvalue(), format="png", embed=True, alt=f"Training and validation loss, {title}")
        if self.handle is None:
            self.handle = display(picture, display_id=True)
        else:
            self.handle.update(picture)
        self.drawn_at = time.monotonic()

"""What is seen while a model trains: one chart that redraws in place, or lines of text where there is no notebook.

One display handle is updated with a PNG. That works in Colab, JupyterLab, Notebook 7, VS Code, Kaggle and nbclient, and it
neither flickers nor leaves a trail of old charts.
"""

from __future__ import annotations

import time
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from helpers.diagnosis import verdict
from helpers.plots import Place, training_chart
from helpers.runs import Run

SHARE_OF_TIME_FOR_DRAWING = 0.02  # a chart takes about a fifth of a second, in which nothing is trained
SECONDS_BETWEEN_REDRAWS = 1.5  # at least
MEASURED_STEPS = 10  # after so many real steps their own time replaces the plan's
LONG_SESSION_HOURS = (
    4  # free Colab ends a session after 12 hours at most, often sooner, and after 90 minutes without a click
)


def has_notebook() -> bool:
    """True inside a Jupyter kernel (which can update what it has displayed), False in a terminal or a script."""
    try:
        from IPython import get_ipython
    except ImportError:
        return False
    return getattr(get_ipython(), "kernel", None) is not None


def warn_of_a_long_run(seconds: float, measured: bool) -> bool:
    """Say so if training outlasts a free session; True if it does."""
    hours = seconds / 3600
    if hours > LONG_SESSION_HOURS:
        print(
            f"[WARN] about {hours:.1f} hours {'left' if measured else 'by the plan'}. A free session may end sooner: mount Drive before "
            "you train, so that the run can go on tomorrow, or lower num_train_epochs."
        )
    return hours > LONG_SESSION_HOURS


class LiveChart(TrainerCallback):
    """Redraws the chart of `run` after log events; without a notebook it prints a line for each instead.

    Args:
        planned_seconds: per step, by the plan; real steps replace it.
        planned_bytes: the peak that the plan expects.
    """

    def __init__(self, run: Run, planned_seconds: float | None = None, planned_bytes: int | None = None) -> None:
        self.run = run
        self.planned_seconds = planned_seconds
        self.planned_bytes = planned_bytes
        self.place = Place()
        self.drawn_at = self.started_at = self.step_started_at = 0.0
        self.drawing_seconds = self.training_seconds = 0.0
        self.first_step = self.first_tokens = self.drawn_events = 0
        self.warned = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.started_at = time.monotonic()
        self.first_step = state.global_step
        self.first_tokens = self._tokens()
        self.warned = warn_of_a_long_run(
            (self.planned_seconds or 0) * (state.max_steps - state.global_step), measured=False
        )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.step_started_at = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.training_seconds += time.monotonic() - self.step_started_at
        if state.global_step - self.first_step == MEASURED_STEPS and not self.warned:
            self.warned = warn_of_a_long_run(self._seconds_left(state), measured=True)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **kwargs: Any
    ) -> None:
        if not has_notebook():
            if "loss" in logs or "eval_loss" in logs:
                print(self._line(state, logs), flush=True)
        elif "eval_loss" in logs or self._may_draw():
            self._draw(state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if has_notebook():
            if any(
                "train_runtime" not in event for event in self.run.history[self.drawn_events :]
            ):  # since the last picture
                self._draw(state)
        else:
            print(f"Verdict: {verdict(self.run.history, state.max_steps)}.")

    def _may_draw(self) -> bool:
        now = time.monotonic()
        budget = SHARE_OF_TIME_FOR_DRAWING * (now - self.started_at)
        return now - self.drawn_at > SECONDS_BETWEEN_REDRAWS and self.drawing_seconds < budget

    def _line(self, state: TrainerState, logs: dict[str, Any]) -> str:
        shown = {"loss": "training loss", "eval_loss": "validation loss"}
        losses = ", ".join(f"{label} {logs[key]:.3f}" for key, label in shown.items() if key in logs)
        return f"step {state.global_step:>4}/{state.max_steps}  {losses}  {self._time_left(state)}"

    def _seconds_left(self, state: TrainerState) -> float:
        """By what the steps of this session really took."""
        done = state.global_step - self.first_step
        return (time.monotonic() - self.started_at) / done * (state.max_steps - state.global_step) if done else 0.0

    def _time_left(self, state: TrainerState) -> str:
        """By the plan until ten steps are done (if it knows this card), from then on by what the steps really took."""
        done, spent = state.global_step - self.first_step, time.monotonic() - self.started_at
        remaining = state.max_steps - state.global_step
        if done < MEASURED_STEPS and self.planned_seconds is not None:
            return f"{spent / 60:.1f} min so far, about {remaining * self.planned_seconds / 60:.1f} min left by the plan, not yet measured"
        if not done:
            return "before the first step"
        left = self._seconds_left(state)
        return f"{spent / 60:.1f} min so far, about {left / 60:.1f} min left" if left > 0 else f"{spent / 60:.1f} min"

    def _tokens(self) -> int:
        return next((event["num_tokens"] for event in reversed(self.run.history) if "num_tokens" in event), 0)

    def _title(self, state: TrainerState) -> str:
        tokens = self._tokens() - self.first_tokens
        rate = f"  ·  {tokens / self.training_seconds:,.0f} tokens/s" if tokens > 0 and self.training_seconds else ""
        return f"step {state.global_step} of {state.max_steps}{rate}  ·  {self._time_left(state)}"

    def _draw(self, state: TrainerState) -> None:
        began = time.monotonic()
        title, sentence = self._title(state), str(verdict(self.run.history, state.max_steps))
        figure = training_chart(self.run.history, state.max_steps, title, sentence, self.planned_bytes)
        self.place.show(figure, f"Training and validation loss, {title}: {sentence}")
        self.drawn_at, self.drawn_events = time.monotonic(), len(self.run.history)
        self.drawing_seconds += self.drawn_at - began

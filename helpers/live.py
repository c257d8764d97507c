"""What is seen while a model trains: one chart that redraws in place, or lines of text where there is no notebook.

One display handle is updated with a PNG. That works in Colab, JupyterLab, Notebook 7, VS Code, Kaggle and nbclient, and it
neither flickers nor leaves a trail of old charts.
"""

from __future__ import annotations

import time
from typing import Any

from transformers import TrainerCallback, TrainerState

from helpers.diagnosis import diagnose
from helpers.plots import Place, has_notebook, training_chart
from helpers.runs import Run

SHARE_OF_TIME_FOR_DRAWING = 0.02  # a chart takes about a fifth of a second, in which nothing is trained
SECONDS_BETWEEN_REDRAWS = 1.5  # at least
MEASURED_STEPS = 10  # after so many real steps their own time replaces the plan's
LONG_SESSION_HOURS = 4  # free Colab ends a session after 12 hours, often sooner, and after 90 minutes without a click


class LiveChart(TrainerCallback):
    """Redraws the chart of `run` after log events; without a notebook it prints a line for each instead.

    Args:
        planned_seconds: per step, by the plan; real steps replace it.
        planned_bytes: the peak that the plan expects.
    """

    def __init__(self, run: Run, planned_seconds: float | None = None, planned_bytes: int | None = None) -> None:
        self.run, self.place = run, Place()
        self.planned_seconds, self.planned_bytes = planned_seconds, planned_bytes
        self.started_at = self.drawn_at = 0.0  # by time.monotonic()
        self.drawing_seconds = 0.0
        self.first_step = self.drawn_events = 0
        self.warned = False

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Start the clock, and warn of a long run by the plan."""
        self.started_at = time.monotonic()
        self.first_step = state.global_step
        self._warn_of_a_long_run(state)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Warn of a long run by what the steps really took."""
        if state.global_step - self.first_step == MEASURED_STEPS:
            self._warn_of_a_long_run(state)

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        """Draw each validation loss, and a training loss if drawing has not taken too much time; or print them."""
        now = time.monotonic()
        if not has_notebook():
            names = {"loss": "training loss", "eval_loss": "validation loss"}
            losses = ", ".join(f"{name} {logs[key]:.3f}" for key, name in names.items() if key in logs)
            if losses:
                print(f"step {state.global_step:>4}/{state.max_steps}  {losses}  {self._time_left(state)}", flush=True)
        elif "eval_loss" in logs or (
            now - self.drawn_at > SECONDS_BETWEEN_REDRAWS
            and self.drawing_seconds < SHARE_OF_TIME_FOR_DRAWING * (now - self.started_at)
        ):
            self._draw(state)

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """The last picture, unless it would show nothing new."""
        if not has_notebook():
            print(f"Diagnosis: {diagnose(self.run.history, state.max_steps)}.")
        elif any("train_runtime" not in event for event in self.run.history[self.drawn_events :]):
            self._draw(state)

    def _warn_of_a_long_run(self, state: TrainerState) -> None:
        seconds, source = self._seconds_left(state)
        if seconds > LONG_SESSION_HOURS * 3600 and not self.warned:
            self.warned = True
            print(
                f"[WARN] about {seconds / 3600:.1f} hours left{source}. A free session may end sooner: mount Drive before "
                "you train, so that the run can go on tomorrow, or lower num_train_epochs."
            )

    def _seconds_left(self, state: TrainerState) -> tuple[float, str]:
        """By the plan until ten steps are done (if it knows this card), from then on by what the steps really took."""
        done, remaining = state.global_step - self.first_step, state.max_steps - state.global_step
        if done < MEASURED_STEPS and self.planned_seconds is not None:
            return remaining * self.planned_seconds, " by the plan, not yet measured"
        return remaining * (time.monotonic() - self.started_at) / max(1, done), ""

    def _time_left(self, state: TrainerState) -> str:
        seconds, source = self._seconds_left(state)
        if state.global_step == self.first_step and not source:
            return "before the first step"
        spent = f"{(time.monotonic() - self.started_at) / 60:.1f} min"
        return f"{spent} so far, about {seconds / 60:.1f} min left{source}" if seconds else spent

    def _title(self, state: TrainerState) -> str:
        timed = [
            event for event in self.run.history if event["step"] > self.first_step and "tokens_per_second" in event
        ]
        speed = f"{timed[-1]['tokens_per_second']:,.0f} tokens/s, {timed[-1]['padding']:.0%} padding" if timed else ""
        return "  ·  ".join(
            filter(None, [f"step {state.global_step} of {state.max_steps}", speed, self._time_left(state)])
        )

    def _draw(self, state: TrainerState) -> None:
        began = time.monotonic()
        title, diagnosis = self._title(state), str(diagnose(self.run.history, state.max_steps))
        figure = training_chart(self.run.history, state.max_steps, title, diagnosis, self.planned_bytes or 0)
        self.place.show(figure, f"Training and validation loss, {title}: {diagnosis}")
        self.drawn_at, self.drawn_events = time.monotonic(), len(self.run.history)
        self.drawing_seconds += self.drawn_at - began

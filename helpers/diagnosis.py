"""A loss curve -> a sentence: what the two losses say, and the one thing to do about it. Pure; no torch.

print(diagnose(run.history))      # overfitting since step 20: validation rises while training falls. ...
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Points = list[tuple[int, float]]  # (step, loss)

# All are ratios of the loss, so that they mean the same for a loss of 4 and of 0.4.
RISE = 0.02  # validation this much above its best counts as rising
FALL = 0.01  # a change smaller than this between two evaluations is none
NOT_MOVING = 0.02  # less than this gained since the untrained model: nothing is learned
BLOWN_UP = 1.5  # a training loss this many times its own best is not noise any more
ENOUGH_OF_THE_RUN = 0.34  # before a third of the run, "not moving" is only "has not begun"


@dataclass(frozen=True)
class Diagnosis:
    """`kind` is one of "too early", "still learning", "levelled off", "overfitting", "not moving", "diverged"."""

    kind: str
    text: str

    def __str__(self) -> str:
        return self.text


def diagnose(history: list[dict[str, Any]], max_steps: int | None = None) -> Diagnosis:
    """What the curve says so far.

    Args:
        history: log events with the keys that TRL writes (`step`, `loss`, `eval_loss`); a loss that was no number is None.
        max_steps: length of the run, to tell "has not begun" from "does not move".
    """
    for event in history:
        if event.get("loss", 0.0) is None or event.get("eval_loss", 0.0) is None:
            what = f"diverged at step {event['step']}: the loss is not a number"
            return Diagnosis("diverged", f"{what}. Use a third of the learning rate.")
    training = [(event["step"], event["loss"]) for event in history if "loss" in event]
    validation = [(event["step"], event["eval_loss"]) for event in history if "eval_loss" in event]
    if training and _has_blown_up(training, validation):
        what = f"diverging: the training loss has jumped to {training[-1][1]:.2f}"
        return Diagnosis("diverged", f"{what}. Use a third of the learning rate.")
    if not validation or validation[-1][0] == 0:
        return Diagnosis("too early", "too early to tell: wait for the next validation point")
    return _diagnose_validation(training, validation, max_steps)


def _diagnose_validation(training: Points, validation: Points, max_steps: int | None) -> Diagnosis:
    """The finer distinctions: nothing has diverged, and there is a validation point of the trained model."""
    trained = [point for point in validation if point[0] > 0]
    best_step, best = min(trained, key=lambda point: point[1])
    last_step, last = trained[-1]
    rising = last > best * (1 + RISE)
    if rising and _training_falls(training, best_step):
        what = f"overfitting since step {best_step}: validation rises while training falls"
        return Diagnosis(
            "overfitting", f"{what}. Step {best_step} is the one to keep; next time use fewer epochs, or more examples"
        )
    first_step, untrained = validation[0]
    if first_step == 0 and best > untrained * (1 - NOT_MOVING):
        steps = max_steps or max(step for step, _ in [*training, *validation])
        if last_step < steps * ENOUGH_OF_THE_RUN:
            return Diagnosis("too early", "too early to tell: the learning rate is still warming up")
        what = f"loss not moving: validation went from {untrained:.2f} to {best:.2f}"
        return Diagnosis("not moving", f"{what}. Raise the learning rate, or check the data")
    earlier = [loss for _, loss in validation[:-1]]
    if not earlier or last < min(earlier) * (1 - FALL):
        return Diagnosis("still learning", "still learning: validation keeps falling, more steps would probably help")
    if rising:
        what = f"validation goes up and down around {best:.2f}: step {best_step} is the one to keep"
    else:
        what = f"levelled off: validation stays near {best:.2f}, so more steps change little"
    return Diagnosis("levelled off", what)


def _training_falls(training: Points, since: int) -> bool:
    """Is the training loss clearly lower after step `since` than up to there? Means of up to five points on each side."""
    before = [loss for step, loss in training if step <= since][-5:]
    after = [loss for step, loss in training if step > since][-5:]
    return bool(before and after) and sum(after) / len(after) < sum(before) / len(before) * (1 - FALL)


def _has_blown_up(training: Points, validation: Points) -> bool:
    """The last two points (or the only one) far above the best so far, and above where training began."""
    losses = [loss for _, loss in training]
    untrained = [loss for step, loss in validation[:1] if step == 0]
    recent = min(losses[-2:])
    return recent > min(losses) * BLOWN_UP and recent > max([losses[0], *untrained])

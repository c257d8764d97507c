"""A curve -> a sentence: what the two losses say, and what to do about it. Pure; no torch.

print(verdict(run.history))
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# All are ratios of the loss, so that they mean the same for a loss of 4 and of 0.4.
RISE = 0.02  # validation this much above its best counts as rising
FALL = 0.01  # a change smaller than this between two evaluations is none
NOT_MOVING = 0.02  # less than this gained since the untrained model: nothing is learned
BLOWN_UP = 1.5  # a training loss this many times its own best is not noise any more
ENOUGH_OF_THE_RUN = 0.34  # before a third of the run, "not moving" is only "has not begun"


@dataclass(frozen=True)
class Verdict:
    """`kind` is one of "too early", "still learning", "levelled off", "overfitting", "not moving", "diverged"."""

    kind: str
    text: str

    def __str__(self) -> str:
        return self.text


def verdict(history: list[dict[str, Any]], total_steps: int | None = None) -> Verdict:
    """What the curve says so far, in a sentence with the one thing to do.

    Args:
        history: log events with the keys that TRL writes (`step`, `loss`, `eval_loss`); a loss that was no number is None.
        total_steps: length of the run, to tell "has not begun" from "does not move".
    """
    broken = next(
        (event for event in history if event.get("loss", 0.0) is None or event.get("eval_loss", 0.0) is None), None
    )
    if broken is not None:
        return Verdict(
            "diverged",
            f"diverged at step {broken['step']}: the loss is not a number. Use a third of the learning rate.",
        )
    training = [(event["step"], event["loss"]) for event in history if "loss" in event]
    validation = [(event["step"], event["eval_loss"]) for event in history if "eval_loss" in event]
    untrained = validation[0][1] if validation and validation[0][0] == 0 else None
    trained = [point for point in validation if point[0] > 0]

    if training and _has_blown_up(training, untrained):
        return Verdict(
            "diverged",
            f"diverging: the training loss has jumped to {training[-1][1]:.2f}. Use a third of the learning rate.",
        )
    if not trained:
        return Verdict("too early", "too early to tell: wait for the next validation point")
    best_step, best = min(trained, key=lambda point: point[1])
    last_step, last = trained[-1]
    if last > best * (1 + RISE) and _training_falls(training, best_step):
        return Verdict(
            "overfitting",
            f"overfitting since step {best_step}: validation rises while training falls. "
            f"Step {best_step} is the one to keep; next time use fewer epochs, or more examples",
        )
    done = last_step / (total_steps or max(last_step, training[-1][0] if training else 0))
    if untrained is not None and best > untrained * (1 - NOT_MOVING):
        if done < ENOUGH_OF_THE_RUN:
            return Verdict("too early", "too early to tell: the learning rate is still warming up")
        return Verdict(
            "not moving",
            f"loss not moving: validation went from {untrained:.2f} to {best:.2f}. Raise the learning rate, or check the data",
        )
    earlier = [loss for _, loss in validation[:-1]]
    if not earlier or last < min(earlier) * (1 - FALL):
        return Verdict("still learning", "still learning: validation keeps falling, more steps would probably help")
    if last > best * (1 + RISE):
        return Verdict(
            "levelled off", f"validation goes up and down around {best:.2f}: step {best_step} is the one to keep"
        )
    return Verdict("levelled off", f"levelled off: validation stays near {best:.2f}, so more steps change little")


def _training_falls(training: list[tuple[int, float]], since: int) -> bool:
    """Is the training loss after step `since` clearly lower than up to there? Means of up to five points on each side."""
    before = [loss for step, loss in training if step <= since][-5:]
    after = [loss for step, loss in training if step > since][-5:]
    return bool(before and after) and sum(after) / len(after) < sum(before) / len(before) * (1 - FALL)


def _has_blown_up(training: list[tuple[int, float]], untrained: float | None) -> bool:
    """The last two points (or the only one) far above the best so far, and above where training began."""
    best = min(loss for _, loss in training)
    recent = min(loss for _, loss in training[-2:])
    start = max(training[0][1], untrained or 0.0)
    return recent > best * BLOWN_UP and recent > start

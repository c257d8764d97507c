"""What the panel does to a config, without a widget: edits that are refused when they cannot work, undo, reset.

settings = Settings(config)
settings.edit({"r": 32})            # "" or the reason why not; then the config is unchanged
settings.undo()
"""

from __future__ import annotations

import ast
import copy
import inspect
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache
from itertools import pairwise
from typing import Any

from helpers.config import ConfigError, TrainConfig

FIELDS = tuple(field.name for field in fields(TrainConfig))
ONE_MOVE_SECONDS = 1.0  # edits of one field that follow each other faster are one move of one slider: undone together
MOST_STEPS = 200
LARGEST_BATCH = 10_000  # the planner tries every divisor


@cache
def field_lessons() -> dict[str, str]:
    """Field of `TrainConfig` -> the sentence under it in the source, so that the panel and the dataclass teach the same."""
    body = ast.parse(inspect.getsource(TrainConfig)).body[0].body
    return {
        field.target.id: " ".join(text.value.value.split())
        for field, text in pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    }


def problems(config: TrainConfig) -> dict[str, str]:
    """Field -> why it cannot work, in the config's own words. Empty if all is well."""
    wrong = _unusable(config)
    try:
        usable(config).check()
    except ConfigError as error:
        return by_field(str(error)) | wrong
    return wrong


def usable(config: TrainConfig) -> TrainConfig:
    """A copy to calculate with: a value that is no number, no text, or beyond all measure is as if it had never been set."""
    copied = copy.copy(config)
    vars(copied).update({name: getattr(TrainConfig, name) for name in _unusable(config)})
    return copied


def by_field(message: str) -> dict[str, str]:
    """The lines of a message, under the field that each begins with."""
    found: dict[str, str] = {}
    for line in message.splitlines():
        start = re.match(r"\w+(?=[=:])", line)
        if start and start[0] in FIELDS:
            found[start[0]] = line
    return found


def _unusable(config: TrainConfig) -> dict[str, str]:
    """Field -> what it must be, for values that nothing can calculate with: "2e-4" (a text), None, nan, a batch of 10**30."""
    found = {}
    for name in FIELDS:
        value, default = getattr(config, name), getattr(TrainConfig, name)
        if name == "target_modules" and isinstance(value, (list, tuple)):
            right, kind = all(isinstance(layer, str) for layer in value), "names of layers"
        elif isinstance(default, str):
            right, kind = isinstance(value, str), "a text in quotes"
        elif isinstance(default, int):
            right, kind = isinstance(value, int) and not isinstance(value, bool), "a whole number"
        else:
            right = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf")
            kind = "a number"
        if not right:
            found[name] = f"{name}={value!r} must be {kind}, such as {default!r}."
    if "effective_batch_size" not in found and config.effective_batch_size > LARGEST_BATCH:
        found["effective_batch_size"] = (
            f"effective_batch_size={config.effective_batch_size} is too large to plan; 8 to 64 is usual."
        )
    return found


@dataclass
class _Step:
    """One thing to undo: what the fields were before, and when they were last changed by it."""

    before: dict[str, Any]
    at: float


class Settings:
    """A config, and what was changed through this object.

    The config itself is the truth: whoever edits it directly is right, and undo then puts back only what was edited here.
    """

    def __init__(self, config: TrainConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self.config = config
        self._clock = clock
        self._steps: list[_Step] = []
        self._at_start = {name: copy.copy(getattr(config, name)) for name in FIELDS}

    def edit(self, changes: dict[str, Any]) -> str:
        """Set fields, all or none. Returns "" or, if a setting could then not work, the reason.

        What was wrong before does not stand in the way of mending something else.
        """
        wished = copy.copy(self.config)
        vars(wished).update(changes)
        wrong_before = set(problems(self.config).values())
        new = [message for message in dict.fromkeys(problems(wished).values()) if message not in wrong_before]
        if new:
            return " ".join(new)
        before = {name: getattr(self.config, name) for name in changes if getattr(self.config, name) != changes[name]}
        if before:
            self._remember(before)
            vars(self.config).update({name: copy.copy(changes[name]) for name in before})
        return ""

    def _remember(self, before: dict[str, Any]) -> None:
        now = self._clock()
        if (
            self._steps
            and len(before) == 1
            and set(self._steps[-1].before) == set(before)
            and now - self._steps[-1].at < ONE_MOVE_SECONDS
        ):
            self._steps[-1].at = now
            return
        self._steps.append(_Step(before, now))
        del self._steps[:-MOST_STEPS]

    @property
    def can_undo(self) -> bool:
        return bool(self._steps)

    def undo(self) -> None:
        """Take back the last move."""
        if self._steps:
            vars(self.config).update(self._steps.pop().before)

    def reset(self) -> str:
        """Everything as it was when the panel was made; can be undone."""
        return self.edit(self._at_start)

"""What the panel does to a config, without a widget: edits that are refused when they cannot work, undo, reset.

settings = Settings(config)
settings.edit({"r": 32})            # "" or the reason why not; then the config is unchanged
settings.undo()
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from helpers.config import TrainConfig

FIELDS = {item.name: item for item in fields(TrainConfig)}
ONE_MOVE_SECONDS = 1.0  # edits of one field that follow each other faster are one move of one slider: undone together


def usable(config: TrainConfig) -> TrainConfig:
    """A copy to calculate with: what cannot work is as if it had never been set."""
    copied = copy.copy(config)
    vars(copied).update({name: FIELDS[name].default for name in config.problems()})
    return copied


class Settings:
    """A config, and what was changed through this object.

    The config itself is the truth: whoever edits it directly is right, and undo then puts back only what was edited here.
    """

    def __init__(self, config: TrainConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self.config = config
        self._clock = clock
        self._at_start = config.to_dict()
        self.moves: list[dict[str, Any]] = []  # for each, the fields that it changed, as they were before
        self._last_edit = 0.0

    def edit(self, changes: dict[str, Any]) -> str:
        """Set fields, all or none. Returns "" or, if a setting could then not work, the reason.

        What was wrong before does not stand in the way of mending something else.
        """
        wished = copy.copy(self.config)
        vars(wished).update(copy.deepcopy(changes))
        wrong_before = self.config.problems().values()
        new = [problem for problem in wished.problems().values() if problem not in wrong_before]
        if new:
            return " ".join(new)
        before = {name: getattr(self.config, name) for name in changes if getattr(self.config, name) != changes[name]}
        if before:
            self._remember(before)
            vars(self.config).update(vars(wished))
        return ""

    def _remember(self, before: dict[str, Any]) -> None:
        now, earlier = self._clock(), self._last_edit
        self._last_edit = now
        same_slider = len(before) == 1 and bool(self.moves) and self.moves[-1].keys() == before.keys()
        if not (same_slider and now - earlier < ONE_MOVE_SECONDS):
            self.moves.append(before)

    def undo(self) -> str:
        """Take back the last move. Returns "", as an edit that was taken does."""
        if self.moves:
            vars(self.config).update(self.moves.pop())
        return ""

    def reset(self) -> str:
        """Everything as it was when the panel was made; can be undone."""
        return self.edit(self._at_start)

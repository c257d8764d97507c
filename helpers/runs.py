"""A run on disk: what was trained, how it went, and whether it is finished.

    run = Run.load("runs/quickstart")
    run.best_step, run.best_eval_loss

The folder is the truth: `run.json` (settings and identity), `history.jsonl` (one JSON object per log event, with TRL's own key
names), `adapter/`, and the figures.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

History = list[dict[str, Any]]


@dataclass
class Run:
    """One training run. `history` holds the log events in order; `model` is set while the trained model is in memory."""

    folder: Path
    identity: str
    settings: dict[str, Any]
    finished: bool = False
    history: History = field(default_factory=list, repr=False)
    model: Any = field(default=None, repr=False)

    @classmethod
    def load(cls, folder: str | Path) -> Run:
        """Read a run folder.

        Raises:
            FileNotFoundError: there is no run.json in it.
        """
        folder = Path(folder)
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        history_file = folder / "history.jsonl"
        lines = history_file.read_text(encoding="utf-8").splitlines() if history_file.is_file() else []
        return cls(folder, record["identity"], record["settings"], record["finished"], [json.loads(line) for line in lines])

    def save(self) -> None:
        """Write run.json, whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        record = {"identity": self.identity, "finished": self.finished, "settings": self.settings}
        draft = self.folder / "run.json.part"
        draft.write_text(json.dumps(record, indent=2), encoding="utf-8")
        os.replace(draft, self.folder / "run.json")

    @property
    def evaluations(self) -> list[tuple[int, float]]:
        """(step, validation loss) in order; the first is the untrained model."""
        return [(event["step"], event["eval_loss"]) for event in self.history if "eval_loss" in event]

    @property
    def first_eval_loss(self) -> float:
        """Validation loss of the untrained model."""
        return self.evaluations[0][1]

    @property
    def best_step(self) -> int:
        """The trained step with the lowest validation loss: the one whose adapter is kept. Step 0 does not count."""
        return self._best()[0]

    @property
    def best_eval_loss(self) -> float:
        return self._best()[1]

    def _best(self) -> tuple[int, float]:
        return min((point for point in self.evaluations if point[0] > 0), key=lambda point: point[1])

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"


def identity_of(settings: dict[str, Any]) -> str:
    """Same settings, same model, same data: same identity. The machine does not matter, so a run can move."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def find_or_start(root: str | Path, name: str, settings: dict[str, Any], again: bool = False) -> Run:
    """The run with exactly these settings if there is one; else a new one in `root/name`, `root/name-2`, ...

    With `again`, a finished run is left alone and a new folder is started.
    """
    identity, number = identity_of(settings), 1
    while True:
        folder = Path(root) / (name if number == 1 else f"{name}-{number}")
        if not (folder / "run.json").is_file():
            return Run(folder, identity, settings)
        run = Run.load(folder)
        if run.identity == identity and not (again and run.finished):
            return run
        number += 1


class HistoryWriter(TrainerCallback):
    """Appends every log event to `history.jsonl` and to the list that the chart draws from."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.run.history.clear()
        (self.run.folder / "history.jsonl").write_text("", encoding="utf-8")

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **kwargs: Any
    ) -> None:
        event = {"step": state.global_step, **logs}
        self.run.history.append(event)
        with (self.run.folder / "history.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")

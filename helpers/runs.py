"""A run on disk: what was trained, how it went, and whether it is finished.

    run = Run.load("runs/quickstart")
    run.best_step, run.best_eval_loss

The folder is the truth: `run.json` (settings, plan and identity), `history.jsonl` (one JSON object per log event, with TRL's own
key names plus `seconds` and `peak_bytes`), `checkpoints/` while it is unfinished, `adapter/`, and the figures.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field, fields
from glob import escape
from itertools import chain
from math import nan
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from helpers.checkpoints import backup, checkpoints_of, latest_complete
from helpers.config import TrainConfig
from helpers.files import atomic_write

RECORD, HISTORY, WEIGHTS = "run.json", "history.jsonl", "adapter_model.safetensors"
History = list[dict[str, Any]]


@dataclass
class Run:
    """One training run. `history` holds the log events in order; `model` is set while the trained model is in memory."""

    folder: Path
    identity: str
    settings: dict[str, Any]
    finished: bool = False
    plan: dict[str, Any] = field(default_factory=dict)
    """How it is trained on this machine: card, micro-batch, checkpointing, ... It may change while the run goes on."""
    history: History = field(default_factory=list, repr=False)
    model: Any = field(default=None, repr=False)

    @classmethod
    def load(cls, folder: str | Path) -> Run:
        """Read a run folder. Without a readable run.json it is the copy in the last checkpoint; FileNotFoundError or ValueError if none."""
        folder = Path(folder)
        try:
            record = _read_record(folder / RECORD)
        except (FileNotFoundError, ValueError):
            if (checkpoint := latest_complete(folder)) is None:
                raise
            record = _read_record(checkpoint / RECORD)
        history = read_history(folder / HISTORY)
        return cls(folder, record["identity"], record["settings"], record["finished"], record.get("plan", {}), history)

    def save(self, **changes: Any) -> None:
        """Write run.json, whole or not at all. `changes`: of the plan, because a setting had to become smaller while it trains."""
        self.plan |= changes
        self.folder.mkdir(parents=True, exist_ok=True)
        record = {"identity": self.identity, "finished": self.finished, "settings": self.settings, "plan": self.plan}
        atomic_write(self.folder / RECORD, json.dumps(record, indent=2))

    @property
    def config(self) -> TrainConfig:
        """The settings as the dataclass that they came from."""
        known = {item.name for item in fields(TrainConfig)}
        return TrainConfig(**{name: value for name, value in self.settings.items() if name in known})

    @property
    def adapter(self) -> Path:
        """The folder of the best step's adapter."""
        return self.folder / "adapter"

    @property
    def evaluations(self) -> list[tuple[int, float]]:
        """(step, validation loss) in order; the first is the untrained model."""
        return [(event["step"], event["eval_loss"]) for event in self.history if event.get("eval_loss") is not None]

    @property
    def trained(self) -> bool:
        """Was it evaluated after a step? Only then is there a best step."""
        return any(step > 0 for step, _ in self.evaluations)

    @property
    def first_eval_loss(self) -> float:
        """Validation loss of the untrained model."""
        return next((loss for _, loss in self.evaluations), nan)

    @property
    def best_step(self) -> int:
        """The trained step with the lowest validation loss: the one whose adapter is kept. Step 0 does not count."""
        return min(((loss, step) for step, loss in self.evaluations if step > 0), default=(nan, 0))[1]

    @property
    def best_eval_loss(self) -> float:
        """Validation loss at the best step."""
        return min((loss for step, loss in self.evaluations if step > 0), default=nan)

    @property
    def seconds(self) -> float:
        """Time spent training, evaluating and saving, over all parts of an interrupted run."""
        return max((event.get("seconds", 0.0) for event in self.history), default=0.0)

    @property
    def peak_bytes(self) -> int:
        """Most memory used while training: reserved on the card, or the resident set of the process on a CPU."""
        return max((event.get("peak_bytes", 0) for event in self.history), default=0)


def _read_record(file: Path) -> dict[str, Any]:
    record, types = json.loads(file.read_text(encoding="utf-8")), {"identity": str, "settings": dict, "finished": bool}
    if not (isinstance(record, dict) and all(isinstance(record.get(name), types[name]) for name in types)):
        raise ValueError("it is not the record of a run")
    return record


def read_history(file: Path) -> History:
    """The events of a history file. Lines that are none, because a kill cut them short or the disk harmed them, are left out."""
    events = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []:
        with suppress(ValueError):
            event = json.loads(line)
            events += [event] if isinstance(event, dict) and isinstance(event.get("step"), int) else []
    return events


def has_adapter(folder: Path) -> bool:
    """Are there weights in this adapter folder, and all of them?"""
    try:
        with safe_open(folder / WEIGHTS, "np") as weights:
            return len(weights.keys()) > 0
    except (FileNotFoundError, SafetensorError):
        return False


def fingerprint(*parts: Iterable[dict[str, Any]]) -> str:
    """SHA-256 of the examples themselves, so that an edited data file is another run."""
    digest = hashlib.sha256()
    for example in chain(*parts):
        digest.update(json.dumps(example, sort_keys=True).encode())
    return digest.hexdigest()


def find_or_start(
    root: str | Path, name: str, settings: dict[str, Any], restart: bool = False, backups: str | Path | None = None
) -> Run:
    """The run with exactly these settings if there is one; else a new one in `root/name`, `root/name-2`, ...

    Args:
        restart: leave a finished run alone and start a new folder.
        backups: the folder of a second place that holds copies of runs: a run that only exists there is brought back first.
    """
    # The machine is no part of a run's identity, so a run can move.
    identity, number = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16], 0
    while True:
        number += 1
        folder = Path(root) / (name if number == 1 else f"{name}-{number}")
        unused = not (folder / RECORD).is_file() and not any(checkpoints_of(folder).glob("checkpoint-*"))
        if unused and (restart or not _restore(backups, name, identity, folder)):
            return Run(folder, identity, settings)
        try:
            run = Run.load(folder)
        except (ValueError, FileNotFoundError) as error:
            print(f"[WARN] {folder / RECORD} cannot be read ({error!r}), so that folder is left alone.")
            continue
        if run.identity != identity or (restart and run.finished):
            continue
        if run.finished and not has_adapter(run.adapter):
            print(f"{folder} was finished, but its adapter is gone or damaged: it has to be trained again.")
            run.finished = False
        return run


def _restore(backups: str | Path | None, name: str, identity: str, folder: Path) -> bool:
    """Bring the run back into `folder` if there is a copy of it. A second place that fails is a warning."""
    try:
        for file in Path(backups).glob(f"{escape(name)}*/{RECORD}") if backups else ():
            with suppress(ValueError):  # a record that is damaged, or not ours
                if _read_record(file)["identity"] == identity:
                    backup(file.parent, folder)
                    return True
    except OSError as error:
        print(f"[WARN] {backups} cannot be read ({error}): what it may hold of this run is not continued.")
    return False


def delete_runs(*folders: str | Path) -> int:
    """Delete whole run folders and return the bytes that came back. A folder without our run.json is refused (FileNotFoundError)."""
    freed = 0
    for folder in map(Path, folders):
        try:
            Run.load(folder)
        except (OSError, ValueError):
            problem = f"{folder} holds no run.json of ours, so it is not a run"
            raise FileNotFoundError(f"{problem}: nothing was deleted there.") from None
        freed += sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        shutil.rmtree(folder)
    print(f"{freed / 2**20:.0f} MiB of disk came back")
    return freed

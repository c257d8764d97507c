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
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from helpers.checkpoints import backup
from helpers.config import TrainConfig
from helpers.files import atomic_write

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
        """Read a run folder.

        Raises:
            FileNotFoundError: there is no run.json in it.
        """
        folder = Path(folder)
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        history = read_history(folder / "history.jsonl")
        return cls(folder, record["identity"], record["settings"], record["finished"], record.get("plan", {}), history)

    def save(self) -> None:
        """Write run.json, whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        record = {"identity": self.identity, "finished": self.finished, "settings": self.settings, "plan": self.plan}
        atomic_write(self.folder / "run.json", json.dumps(record, indent=2))

    def change_plan(self, changes: dict[str, Any]) -> None:
        """Write down settings that had to become smaller while it trains."""
        self.plan |= changes
        self.save()

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
        return self.evaluations[0][1]

    @property
    def best_step(self) -> int:
        """The trained step with the lowest validation loss: the one whose adapter is kept. Step 0 does not count."""
        return min((loss, step) for step, loss in self.evaluations if step > 0)[1]

    @property
    def best_eval_loss(self) -> float:
        """Validation loss at the best step."""
        return min(loss for step, loss in self.evaluations if step > 0)

    @property
    def seconds(self) -> float:
        """Time spent training, evaluating and saving, over all parts of an interrupted run."""
        return max((event.get("seconds", 0.0) for event in self.history), default=0.0)

    @property
    def peak_bytes(self) -> int:
        """Most memory used while training: reserved on the card, or the resident set of the process on a CPU."""
        return max((event.get("peak_bytes", 0) for event in self.history), default=0)


def read_history(file: Path) -> History:
    """The events of a history file; a last line that was cut short by a kill is left out."""
    events = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        try:
            events.append(json.loads(line))
        except ValueError:
            break
    return events


def identity_of(settings: dict[str, Any]) -> str:
    """Same settings, same model, same data: same identity. The machine does not matter, so a run can move."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def fingerprint(*parts: Iterable[dict[str, Any]]) -> str:
    """SHA-256 of the examples themselves, so that an edited data file is another run."""
    digest = hashlib.sha256()
    for part in parts:
        for example in part:
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
    identity, number = identity_of(settings), 0
    while True:
        number += 1
        folder = Path(root) / (name if number == 1 else f"{name}-{number}")
        if not (folder / "run.json").is_file() and (restart or not _restore(backups, name, identity, folder)):
            return Run(folder, identity, settings)
        try:
            run = Run.load(folder)
        except (ValueError, KeyError) as error:
            print(f"[WARN] {folder}/run.json cannot be read ({error!r}), so that folder is left alone.")
            continue
        if run.identity != identity or (restart and run.finished):
            continue
        if run.finished and not (run.adapter / "adapter_model.safetensors").is_file():
            print(f"{folder} was finished, but its adapter is gone: it has to be trained again.")
            run.finished = False
        return run


def _restore(backups: str | Path | None, name: str, identity: str, folder: Path) -> bool:
    """Bring the run back into `folder` if there is a copy of it. A second place that fails is a warning."""
    if backups is None:
        return False
    try:
        for file in Path(backups).glob(f"{name}*/run.json"):
            if _identity_in(file) == identity:
                backup(file.parent, folder)
                return True
    except OSError as error:
        print(f"[WARN] {backups} cannot be read ({error}): what it may hold of this run is not continued.")
    return False


def _identity_in(file: Path) -> str | None:
    try:
        return json.loads(file.read_text(encoding="utf-8"))["identity"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None  # half copied, or not ours


def delete_runs(*folders: str | Path) -> int:
    """Delete whole run folders and return the bytes that came back. What is not a run folder is refused.

    Raises:
        FileNotFoundError: a folder holds no run.json of this kit, so it is not ours to delete.
    """
    freed = 0
    for folder in map(Path, folders):
        if not _identity_in(folder / "run.json"):
            raise FileNotFoundError(
                f"{folder} holds no run.json of ours, so it is not a run: nothing was deleted there."
            )
        freed += sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        shutil.rmtree(folder)
    print(f"{freed / 2**20:.0f} MiB of disk came back")
    return freed

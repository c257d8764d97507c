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

from helpers.checkpoints import atomic_write, fetch
from helpers.config import TrainConfig

History = list[dict[str, Any]]
# A run cannot be continued with another of these: the weights, or what they learned, would not be the same thing any more.
FIXED = ("model", "data_sha256", "quantization", "r", "lora_alpha", "target_modules")


class RunMismatch(ValueError):
    """The run that was to be continued was made with other data, another model or another adapter. The message shows what differs."""


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

    @property
    def config(self) -> TrainConfig:
        """The settings as the dataclass that they came from."""
        return TrainConfig(
            **{item.name: self.settings[item.name] for item in fields(TrainConfig) if item.name in self.settings}
        )

    @property
    def evaluations(self) -> list[tuple[int, float]]:
        """(step, validation loss) in order; the first is the untrained model."""
        return [(event["step"], event["eval_loss"]) for event in self.history if event.get("eval_loss") is not None]

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
    def seconds(self) -> float:
        """Time spent training, evaluating and saving, over all parts of an interrupted run."""
        return max((event.get("seconds", 0.0) for event in self.history), default=0.0)

    @property
    def peak_bytes(self) -> int:
        """Most memory used while training: reserved on the card, or the resident set of the process on a CPU."""
        return max((event.get("peak_bytes", 0) for event in self.history), default=0)

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"


def read_history(file: Path) -> History:
    """The events of a history file; a last line that was cut short by a kill is left out."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    events = []
    for line in lines:
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
    root: str | Path, name: str, settings: dict[str, Any], restart: bool = False, mirrored: str | Path | None = None
) -> Run:
    """The run with exactly these settings if there is one; else a new one in `root/name`, `root/name-2`, ...

    With `again`, a finished run is left alone and a new folder is started. With `mirrored` (the folder of a second place that
    holds copies of runs), a run that only exists there is brought back first.
    """
    identity, number = identity_of(settings), 1
    while True:
        folder = Path(root) / (name if number == 1 else f"{name}-{number}")
        if not (folder / "run.json").is_file():
            try:
                copy = _mirrored_run(mirrored, name, identity) if not restart else None
                if copy is not None:
                    fetch(copy, folder)
            except OSError as error:
                print(
                    f"[WARN] {mirrored} cannot be read ({error}): an earlier part of this run, if it is there, is not continued."
                )
                copy = None
            if copy is None:
                return Run(folder, identity, settings)
        number += 1
        try:
            run = Run.load(folder)
        except (ValueError, KeyError) as error:
            print(f"[WARN] {folder}/run.json cannot be read ({error!r}), so that folder is left alone.")
            continue
        if run.identity == identity and not (restart and run.finished):
            return run


def _mirrored_run(mirrored: str | Path | None, name: str, identity: str) -> Path | None:
    if mirrored is None:
        return None
    for file in Path(mirrored).glob(f"{name}*/run.json"):
        try:
            if json.loads(file.read_text(encoding="utf-8"))["identity"] == identity:
                return file.parent
        except (OSError, ValueError, KeyError):
            continue  # half copied, or not ours
    return None


def continue_from(folder: str | Path, settings: dict[str, Any]) -> Run:
    """The run in `folder`, to be continued with `settings` (more steps, say).

    Raises:
        RunMismatch: data, model or adapter differ, which would train something else under the same name.
        FileNotFoundError: there is no run in that folder.
    """
    run = Run.load(folder)
    different = [
        f"{key}: {_short(run.settings.get(key))} there, {_short(settings.get(key))} now"
        for key in FIXED
        if run.settings.get(key) != settings.get(key)
    ]
    if different:
        raise RunMismatch(
            f"{folder} cannot be continued with these settings, because they would train something else: {'; '.join(different)}. "
            "Put these settings back, or leave resume= out to start a new run."
        )
    run.settings, run.identity = settings, identity_of(settings)
    run.finished = False
    return run


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:16] + "…"


def delete_runs(*folders: str | Path) -> int:
    """Delete whole run folders and return the bytes that came back. What is not a run folder is refused.

    Raises:
        FileNotFoundError: a folder holds no run.json, so it is not ours to delete.
    """
    freed = 0
    for folder in map(Path, folders):
        if not (folder / "run.json").is_file():
            raise FileNotFoundError(f"{folder} holds no run.json, so it is not a run: nothing was deleted there.")
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        shutil.rmtree(folder)
        freed += size
        print(f"{folder}: deleted, {size / 2**20:.0f} MiB of disk came back")
    return freed

"""Checkpoints that are complete or do not count.

    mark_complete(folder)            # after everything is written: now it counts
    latest_complete(run_folder)      # the one to continue from, or None
    keep(run_folder, best_step=40)   # the last two and the best; the others go
    backup(run_folder, target)       # the same run in a second place; the other way round, it is brought back

A checkpoint is a folder `checkpoints/checkpoint-<step>` in which the last file written is a manifest: size and SHA-256 of every
other file, flushed to the disk after them. A process that is killed while it writes leaves a folder without a manifest, and
that is ignored. Nothing in a checkpoint names the machine or the folder around it, so a run can move.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from helpers.files import atomic_file, atomic_folder, atomic_write, flush

MANIFEST = "manifest.json"
KEEP_LAST = 2


def checkpoints_of(run_folder: str | Path) -> Path:
    """The folder that holds a run's checkpoints."""
    return Path(run_folder) / "checkpoints"


def checkpoint_step(checkpoint: Path) -> int:
    """The optimizer step after which it was written, from its name."""
    return int(checkpoint.name.rpartition("-")[2])


def mark_complete(folder: Path) -> None:
    """Flush every file of the checkpoint in `folder` to the disk, then write the manifest, flushed too.

    What would tie it to this machine goes first: the pickled arguments (nothing reads them) and the path of the best checkpoint
    in `trainer_state.json` (its step stays, and `best_checkpoint` finds it from that).
    """
    (folder / "training_args.bin").unlink(missing_ok=True)
    state = trainer_state(folder) | {"best_model_checkpoint": None}
    (folder / "trainer_state.json").write_text(json.dumps(state, indent=2), encoding="utf-8")
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(MANIFEST))
    for file in files:
        flush(file)
    manifest = {file.relative_to(folder).as_posix(): _size_and_sha256(file) for file in files}
    atomic_write(folder / MANIFEST, json.dumps(manifest, indent=2))


def is_complete(folder: Path, *, read: bool = True) -> bool:
    """Has it a manifest that its files agree with? With `read=False` only names and sizes are compared."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if read:
            return all(_size_and_sha256(folder / name) == wanted for name, wanted in manifest.items())
        return all((folder / name).stat().st_size == size for name, (size, _) in manifest.items())
    except (OSError, ValueError, TypeError, AttributeError):
        return False


def complete_checkpoints(run_folder: str | Path) -> list[Path]:
    """The complete checkpoints of a run, by names and sizes, oldest first."""
    folders = [f for f in checkpoints_of(run_folder).glob("checkpoint-*") if f.name.rpartition("-")[2].isdigit()]
    return sorted((folder for folder in folders if is_complete(folder, read=False)), key=checkpoint_step)


def latest_complete(run_folder: str | Path) -> Path | None:
    """The newest checkpoint whose files are what its manifest says, byte for byte."""
    return next((folder for folder in reversed(complete_checkpoints(run_folder)) if is_complete(folder)), None)


def trainer_state(checkpoint: Path) -> dict[str, Any]:
    """What Trainer wrote about itself: step, best step, patience."""
    return json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))


def best_checkpoint(run_folder: str | Path, best_step: int | None) -> Path | None:
    """The complete checkpoint of `best_step`, wherever the run now lies."""
    return next((folder for folder in complete_checkpoints(run_folder) if checkpoint_step(folder) == best_step), None)


def keep(run_folder: str | Path, best_step: int | None, last: int = KEEP_LAST) -> None:
    """Delete all checkpoints but the `last` complete ones and the best one. Only complete ones replace complete ones."""
    complete = complete_checkpoints(run_folder)
    staying = {folder.name for folder in complete[-last:]} | {f"checkpoint-{best_step}"}
    for folder in checkpoints_of(run_folder).glob("checkpoint-*"):
        if complete and folder.name not in staying:
            (folder / MANIFEST).unlink(missing_ok=True)  # not complete any more, should the deletion be cut short
            shutil.rmtree(folder, ignore_errors=True)


def drop_incomplete(run_folder: str | Path) -> None:
    """Delete what a killed process left behind, so that the step can be written again."""
    for folder in checkpoints_of(run_folder).glob("checkpoint-*"):
        if not is_complete(folder):
            shutil.rmtree(folder, ignore_errors=True)


def backup(run_folder: Path, target: Path) -> None:
    """Make `target` (on a mounted Drive, say) hold the same run. run.json comes last, because it makes a folder a run.

    Raises:
        OSError: the other place fails; this side is untouched.
    """
    checkpoints = [f"checkpoints/{folder.name}" for folder in complete_checkpoints(run_folder)]
    for name in (*checkpoints, "adapter", "history.jsonl", "run.json"):
        already_there = name in checkpoints and is_complete(target / name, read=False)
        if (run_folder / name).exists() and not already_there:
            _copy(run_folder / name, target / name)
    for folder in checkpoints_of(target).glob("checkpoint-*"):
        if not (checkpoints_of(run_folder) / folder.name).is_dir():
            shutil.rmtree(folder, ignore_errors=True)


def _copy(source: Path, target: Path) -> None:
    """Under another name, then renamed, so that a broken copy is never taken for a whole one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        with atomic_folder(target) as draft:
            shutil.copytree(source, draft, dirs_exist_ok=True)
    else:
        with atomic_file(target) as draft:
            shutil.copyfile(source, draft)


def _size_and_sha256(file: Path) -> list[int | str]:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
        return [stream.tell(), digest.hexdigest()]

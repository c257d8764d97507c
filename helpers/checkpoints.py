"""Checkpoints that are whole or not there.

    seal(folder)                     # after everything is written: now it counts
    latest_complete(run_folder)         # the one to continue from, or None
    keep(run_folder, best_step=40)   # the last two and the best; the others go

A checkpoint is a folder `checkpoints/checkpoint-<step>` in which the last file written is a manifest: size and SHA-256 of every
other file, flushed to the disk after them. A process that is killed while it writes leaves a folder without a manifest, and
that is ignored. Nothing in a checkpoint names the machine or the folder around it, so a run can move.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

MANIFEST = "manifest.json"
KEEP_LAST = 2
PART = ".part"  # ends the name of what is still being copied


def checkpoints_of(run_folder: str | Path) -> Path:
    return Path(run_folder) / "checkpoints"


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def seal(folder: Path) -> None:
    """Make the checkpoint in `folder` whole: flush every file, then write the manifest, flushed too.

    What would tie it to this machine goes first: the pickled arguments (nothing reads them) and the path of the best checkpoint
    in `trainer_state.json` (its step stays, and `best_checkpoint` finds it from that).
    """
    (folder / "training_args.bin").unlink(missing_ok=True)
    state_file = folder / "trainer_state.json"
    if state_file.is_file():
        state = json.loads(state_file.read_text(encoding="utf-8"))
        state_file.write_text(json.dumps(state | {"best_model_checkpoint": None}, indent=2), encoding="utf-8")
    files = {name: _describe(folder / name, flush=True) for name in _files(folder)}
    atomic_write(folder / MANIFEST, json.dumps(files, indent=2))


def atomic_write(file: Path, text: str) -> None:
    """Write a small file so that it is there completely or not at all, even if the power fails."""
    draft = file.with_name(file.name + PART)
    with draft.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(draft, file)
    if os.name == "posix":  # the new name itself lives in the folder
        descriptor = os.open(file.parent, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def is_whole(folder: Path, *, read: bool = True) -> bool:
    """Has it a manifest that its files agree with? With `read=False` only names and sizes are compared."""
    try:
        wanted = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if not read:
            return all((folder / name).stat().st_size == size for name, (size, _) in wanted.items())
        return wanted == {name: list(_describe(folder / name)) for name in wanted}
    except (OSError, ValueError, TypeError, AttributeError):
        return False


def whole(run_folder: str | Path, *, read: bool = False) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    folders = [f for f in checkpoints_of(run_folder).glob("checkpoint-*") if f.name.rpartition("-")[2].isdigit()]
    return sorted((folder for folder in folders if is_whole(folder, read=read)), key=step_of)


def latest_complete(run_folder: str | Path) -> Path | None:
    """The newest checkpoint whose files are what its manifest says, byte for byte."""
    return next((folder for folder in reversed(whole(run_folder)) if is_whole(folder)), None)


def trainer_state(checkpoint: Path) -> dict:
    return json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))


def best_checkpoint(run_folder: str | Path, best_step: int | None) -> Path | None:
    """The whole checkpoint of `best_step`, wherever the run now lies."""
    return next((folder for folder in whole(run_folder) if step_of(folder) == best_step), None)


def keep(run_folder: str | Path, best_step: int | None, last: int = KEEP_LAST) -> None:
    """Delete all checkpoints but the `last` whole ones and the best one. Only whole ones replace whole ones."""
    there = whole(run_folder)
    staying = {folder.name for folder in there[-last:]} | {f"checkpoint-{best_step}"}
    for folder in checkpoints_of(run_folder).glob("checkpoint-*"):
        if there and folder.name not in staying:
            (folder / MANIFEST).unlink(missing_ok=True)  # not whole any more, should the deletion be cut short
            shutil.rmtree(folder, ignore_errors=True)


def drop_half_written(run_folder: str | Path) -> None:
    """Delete what a killed process left behind, so that the step can be written again."""
    good = {folder.name for folder in whole(run_folder, read=True)}
    for folder in checkpoints_of(run_folder).glob("checkpoint-*"):
        if folder.name not in good:
            shutil.rmtree(folder, ignore_errors=True)


# ------------------------------------------------------------------------------------------------- a second place


def mirror(run_folder: Path, target: Path) -> None:
    """Make `target` (on a mounted Drive, say) hold the same run: each item is copied under another name and then renamed.

    Raises:
        OSError: the other place fails; this side is untouched.
    """
    here = checkpoints_of(run_folder)
    items = [f"checkpoints/{folder.name}" for folder in whole(run_folder)]
    items += [
        name for name in ("adapter", "history.jsonl", "run.json") if (run_folder / name).exists()
    ]  # run.json comes last
    for name in items:
        copied = target / name
        if name.startswith("checkpoints/") and is_whole(copied, read=False):
            continue
        _copy(run_folder / name, copied)
    for folder in checkpoints_of(target).glob("checkpoint-*"):
        if not (here / folder.name).is_dir():
            shutil.rmtree(folder, ignore_errors=True)


def fetch(source: Path, run_folder: Path) -> None:
    """Bring a mirrored run back into an empty place; run.json comes last, because it makes the folder a run."""
    mirror(source, run_folder)


def _copy(source: Path, target: Path) -> None:
    draft = target.with_name(target.name + PART)
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove(draft)
    shutil.copytree(source, draft) if source.is_dir() else shutil.copyfile(source, draft)
    if target.is_dir():
        _remove(target)
    os.replace(draft, target)


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _files(folder: Path) -> list[str]:
    found = (path for path in folder.rglob("*") if path.is_file() and path.name not in (MANIFEST, MANIFEST + PART))
    return sorted(path.relative_to(folder).as_posix() for path in found)


def _describe(file: Path, *, flush: bool = False) -> tuple[int, str]:
    """(bytes, SHA-256)."""
    with file.open("rb+" if flush else "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256") if hasattr(hashlib, "file_digest") else _digest(stream)
        if flush:
            os.fsync(stream.fileno())
        return stream.tell(), digest.hexdigest()


def _digest(stream) -> hashlib._Hash:  # Python 3.10 has no hashlib.file_digest
    digest = hashlib.sha256()
    while block := stream.read(2**20):
        digest.update(block)
    return digest

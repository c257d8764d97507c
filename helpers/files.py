"""Files and folders that are there completely or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PART = ".finetune-kit.part"  # ends the name of what is still being written: a name that nobody else's work has


class ExportError(RuntimeError):
    """This cannot be exported. The message says why and what to do, in one sentence."""


def free_bytes(place: Path) -> int:
    """What is free on the disk that holds `place`, which need not be there yet."""
    folder = next(folder for folder in (place.resolve(), *place.resolve().parents) if folder.exists())
    return shutil.disk_usage(folder).free


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """The name of a draft to write, which becomes `target` when all of it is on the disk, even if the power fails."""
    draft = target.with_name(target.name + PART)
    try:
        yield draft
        flush(draft)
        os.replace(draft, target)
    finally:
        draft.unlink(missing_ok=True)
    _flush_names(target.parent)


def atomic_write(file: Path, text: str) -> None:
    """Write a small file so that it is there completely or not at all."""
    with atomic_file(file) as draft:
        draft.write_text(text, encoding="utf-8")


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A draft folder to write into, which takes the place of `target` when all of it is on the disk."""
    draft, older = (target.with_name(f"{target.name}{end}{PART}") for end in ("", ".older"))
    if older.is_dir() and not target.exists():  # killed between the two names at the end
        os.replace(older, target)
    for folder in (draft, older):
        shutil.rmtree(folder, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        yield draft
        for file in filter(Path.is_file, draft.rglob("*")):
            flush(file)
        if target.is_dir():
            os.replace(target, older)
        os.replace(draft, target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    _flush_names(target.parent)
    shutil.rmtree(older, ignore_errors=True)


def flush(file: Path) -> None:
    """Make sure that the bytes are on the disk and not only on their way."""
    with file.open("rb+") as stream:
        os.fsync(stream.fileno())


def _flush_names(folder: Path) -> None:
    """The same for the names in a folder."""
    if os.name == "posix":
        names = os.open(folder, os.O_RDONLY)
        with suppress(OSError):  # some drives have no such thing
            os.fsync(names)
        os.close(names)

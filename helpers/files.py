"""Files and folders that are there completely or not at all, and room on the disk for them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PART, OLD = ".part", ".old"  # end the names of what is still being written, and of what it has just replaced
SPARE = 200 * 2**20  # bytes of the disk that stay free


class ExportError(RuntimeError):
    """This cannot be exported. The message says why and what to do, in one sentence."""


def free_bytes(place: Path) -> int:
    """What is free on the disk that holds `place`, which need not be there yet."""
    folder = next(folder for folder in (place.resolve(), *place.resolve().parents) if folder.exists())
    return shutil.disk_usage(folder).free


def check_disk(place: Path, needed: int) -> None:
    """Raise `ExportError` if the disk that holds `place` has less than `needed` bytes to give."""
    free = max(0, free_bytes(place) - SPARE)
    if free < needed:
        raise ExportError(
            f"{place} needs {needed / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB to give: delete old runs "
            "(helpers.runs.delete_runs), or name a folder on another disk."
        )


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """The name of a draft to write, which becomes `target` when all of it is on the disk, even if the power fails."""
    draft = target.with_name(target.name + PART)
    try:
        yield draft
        flush(draft)
        os.replace(draft, target)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    _flush_names(target.parent)


def atomic_write(file: Path, text: str) -> None:
    """Write a small file so that it is there completely or not at all."""
    with atomic_file(file) as draft:
        draft.write_text(text, encoding="utf-8")


@contextmanager
def atomic_folder(target: Path, sign: str | None = None) -> Iterator[Path]:
    """A draft folder to write into, which becomes `target` when all is written and on the disk. Only then an older one goes.

    Args:
        sign: a file that every folder of this kind holds. An older `target` is replaced only if it holds one, or nothing at all;
            without a sign, `target` is ours in any case.
    """
    if sign and target.exists() and not (target / sign).is_file() and (not target.is_dir() or any(target.iterdir())):
        not_ours = f"{target} holds something else, so it is left alone"
        raise ExportError(f"{not_ours}: name another folder, or delete it first.")
    draft, old = (target.with_name(target.name + ending) for ending in (PART, OLD))
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        yield draft
        for file in draft.rglob("*"):
            if file.is_file():
                flush(file)
        shutil.rmtree(old, ignore_errors=True)
        if target.is_dir():  # a deletion can be cut short, a renaming cannot
            os.replace(target, old)
        os.replace(draft, target)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    _flush_names(target.parent)
    shutil.rmtree(old, ignore_errors=True)


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

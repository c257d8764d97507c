"""Files and folders that are there completely or not at all, and room on the disk for them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PART = ".part"  # ends the name of what is still being written
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
    """The name of a draft to write, which becomes `target` when all of it is on the disk."""
    draft = target.with_name(target.name + PART)
    yield draft
    flush(draft)
    os.replace(draft, target)


def atomic_write(file: Path, text: str) -> None:
    """Write a small file so that it is there completely or not at all, even if the power fails."""
    with atomic_file(file) as draft:
        draft.write_text(text, encoding="utf-8")
    if os.name == "posix":  # the new name itself lives in the folder
        folder = os.open(file.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


@contextmanager
def atomic_folder(target: Path, sign: str | None = None) -> Iterator[Path]:
    """A draft folder to write into, which becomes `target` when all is written and on the disk.

    Args:
        sign: a file that every folder of this kind holds. An older `target` is replaced only if it holds one, or nothing at all;
            without a sign, `target` is ours in any case.
    """
    if sign and target.exists() and not (target / sign).is_file() and (not target.is_dir() or any(target.iterdir())):
        not_ours = f"{target} holds something else, so it is left alone"
        raise ExportError(f"{not_ours}: name another folder, or delete it first.")
    draft = target.with_name(target.name + PART)
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        yield draft
        for file in draft.rglob("*"):
            if file.is_file():
                flush(file)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    if target.is_dir():
        shutil.rmtree(target)
    os.replace(draft, target)


def flush(file: Path) -> None:
    """Make sure that the bytes are on the disk and not only on their way."""
    with file.open("rb+") as stream:
        os.fsync(stream.fileno())

"""Writing what is large, or where somebody else's work may lie."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from helpers.files import ExportError, atomic_folder, free_bytes

SPARE = 200 * 2**20  # bytes of the disk that stay free
ROOM = "delete old runs (helpers.runs.delete_runs), or name a folder on another disk"


@contextmanager
def writing(target: Path, needed: int = 0) -> Iterator[None]:
    """Within it, a folder that cannot be written and a full disk (at first: less than `needed` bytes) are one sentence."""
    free = max(0, free_bytes(target) - SPARE)
    if free < needed:
        raise ExportError(f"{target} needs {needed / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB to give: {ROOM}.")
    try:
        yield
    except OSError as error:
        fix = ROOM if error.errno in (errno.ENOSPC, errno.EDQUOT) else "name a folder that you may write to"
        raise ExportError(f"{target} could not be written ({error.strerror or error}): {fix}.") from error


@contextmanager
def new_folder(target: Path, sign: str, needed: int = 0) -> Iterator[Path]:
    """`atomic_folder`, which replaces only an older one of its kind: one that holds `sign` and nothing that is not written again."""
    with writing(target, needed), atomic_folder(target) as draft:
        found = set(os.listdir(target)) if target.is_dir() else set()
        if sign in found or not found:
            yield draft
            found -= set(os.listdir(draft))
        if found:
            raise ExportError(f"{target} holds {min(found)}, so it is left alone: name another folder, or delete it.")

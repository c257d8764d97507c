"""How much memory a process's children need together, while they run.

with PeakOfChildren() as peak:
    subprocess.run(...)
print(peak.gib)
"""

from __future__ import annotations

import sys
from contextlib import suppress
from threading import Event, Thread

import psutil

SECONDS_BETWEEN_LOOKS = 1.0


class PeakOfChildren:
    """Looks at the sum over all children every second; and at the most that any one of them ever had, which misses nothing."""

    def __init__(self) -> None:
        self._together = 0

    def __enter__(self) -> PeakOfChildren:
        self._over = Event()
        self._watcher = Thread(target=self._watch, daemon=True)
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._watcher.join()

    @property
    def gib(self) -> float:
        return max(self._together, _largest_child()) / 2**30

    def _watch(self) -> None:
        me = psutil.Process()
        while not self._over.wait(SECONDS_BETWEEN_LOOKS):
            self._together = max(self._together, sum(_memory(child) for child in me.children(recursive=True)))


def _memory(process: psutil.Process) -> int:
    """Bytes of RAM; what several processes share (libraries, mostly) counts in parts, where the system says so."""
    with suppress(psutil.Error):
        if sys.platform == "linux":
            return process.memory_full_info().pss
        return process.memory_info().rss
    return 0  # it has just ended


def _largest_child() -> int:
    """The most that any finished child had; 0 where the system does not keep it (Windows)."""
    try:
        import resource
    except ImportError:
        return 0
    kilobyte = 1 if sys.platform == "darwin" else 1024  # macOS counts in bytes, Linux in KiB
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * kilobyte

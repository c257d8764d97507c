"""What a cell costs: seconds, RAM of this process, and memory of the card, from a `with` block.

with Cost() as cost:
    model = AutoModelForCausalLM.from_pretrained(folder)
print(cost)
"""

from __future__ import annotations

import gc
import time
from threading import Event, Thread

import psutil
import torch

from helpers.memory import MIB

SECONDS_BETWEEN_LOOKS = 0.005


class Cost:
    """Measures its `with` block. RAM is looked at many times a second, so a very short peak may be missed. Sizes in bytes."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.ram_before = self.ram_peak = self.ram_after = self.gpu_before = self.gpu_peak = 0

    def __enter__(self) -> Cost:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # what was asked for before belongs to nobody's cost but its own
            torch.cuda.reset_peak_memory_stats()
            self.gpu_before = torch.cuda.memory_allocated()
        self.ram_before = self.ram_peak = _ram()
        self._over = Event()
        self._watcher = Thread(target=self._watch, daemon=True)
        self._started = time.perf_counter()
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            self.gpu_peak = torch.cuda.max_memory_allocated()
        self.seconds = time.perf_counter() - self._started
        self._over.set()
        self._watcher.join()
        self.ram_after = _ram()
        self.ram_peak = max(self.ram_peak, self.ram_after)

    def _watch(self) -> None:
        while not self._over.wait(SECONDS_BETWEEN_LOOKS):
            self.ram_peak = max(self.ram_peak, _ram())

    def __str__(self) -> str:
        ram = f"RAM of this process {_mib(self.ram_before)} before, {_mib(self.ram_peak)} at the peak, {_mib(self.ram_after)} after"
        gpu = (
            f"; on the card {_mib(self.gpu_before)} before, {_mib(self.gpu_peak)} at the peak"
            if torch.cuda.is_available()
            else ""
        )
        return f"{self.seconds:.1f} s; {ram} (MiB){gpu}"


def _ram() -> int:
    return psutil.Process().memory_info().rss


def _mib(size: int) -> str:
    return f"{size / MIB:,.0f}"

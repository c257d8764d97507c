"""What card is this, and what does that mean for training?

    gpu = detect_gpu()              # the card in this machine ...
    gpu = KNOWN_GPUS["T4"]          # ... or one that you do not own, to plan for it
    dtype, reason = compute_dtype(gpu)

Decisions are pure functions of a small `Gpu` and come with their reason, so they can be tested and shown without a card.
torch is imported only inside `detect_gpu`.
"""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from helpers.catalog import ModelShape

MIB, GIB = 2**20, 2**30
AMPERE = (8, 0)  # the first compute capability with bf16 arithmetic in hardware


@dataclass(frozen=True)
class Gpu:
    """One training device. Sizes in bytes. `kind` is "cuda", "mps" or "cpu"; for "cpu" the memory is the machine's RAM."""

    name: str
    kind: str
    total_bytes: int
    free_bytes: int
    capability: tuple[int, int] | None = None
    ram_free_bytes: int = 12 * GIB
    count: int = 1
    triton: bool = True
    """False once TRL's Triton kernels have failed on this card."""

    def __str__(self) -> str:
        what = {"cuda": "free of", "mps": "shared memory free of", "cpu": "RAM free of"}[self.kind]
        capability = f", compute capability {self.capability[0]}.{self.capability[1]}" if self.capability else ""
        return f"{self.name}: {self.free_bytes / GIB:.1f} GiB {what} {self.total_bytes / GIB:.1f} GiB{capability}"


def _card(name: str, mib: int, capability: tuple[int, int]) -> Gpu:
    """A card for planning: what `mem_get_info()` reports as total on it, taken as wholly free."""
    return Gpu(name, "cuda", mib * MIB, mib * MIB, capability)


# MiB as the driver reports them (a little less than the box says). T4: 14,912 MiB, the total that PyTorch reported on 41
# recorded T4 runs. Others: the nominal size, less what the driver of that generation keeps for itself where it is known.
KNOWN_GPUS: dict[str, Gpu] = {
    short: _card(name, mib, capability)
    for short, name, mib, capability in [
        ("T4", "Tesla T4", 14912, (7, 5)),
        ("P100", "Tesla P100", 16276, (6, 0)),
        ("L4", "NVIDIA L4", 22700, (8, 9)),
        ("A100", "NVIDIA A100 40GB", 40326, (8, 0)),
        ("RTX 2060", "NVIDIA GeForce RTX 2060", 6144, (7, 5)),
        ("RTX 2070", "NVIDIA GeForce RTX 2070", 8192, (7, 5)),
        ("RTX 2080 Ti", "NVIDIA GeForce RTX 2080 Ti", 11264, (7, 5)),
        ("RTX 3060", "NVIDIA GeForce RTX 3060", 12288, (8, 6)),
        ("RTX 3070", "NVIDIA GeForce RTX 3070", 8192, (8, 6)),
        ("RTX 3080 10GB", "NVIDIA GeForce RTX 3080", 10240, (8, 6)),
        ("RTX 3090", "NVIDIA GeForce RTX 3090", 24576, (8, 6)),
        ("RTX 4060", "NVIDIA GeForce RTX 4060", 8188, (8, 9)),
        ("RTX 4060 Ti 16GB", "NVIDIA GeForce RTX 4060 Ti", 16380, (8, 9)),
        ("RTX 4070", "NVIDIA GeForce RTX 4070", 12282, (8, 9)),
        ("RTX 4070 Ti SUPER", "NVIDIA GeForce RTX 4070 Ti SUPER", 16376, (8, 9)),
        ("RTX 4090", "NVIDIA GeForce RTX 4090", 24564, (8, 9)),
        ("RTX 5060 Ti 16GB", "NVIDIA GeForce RTX 5060 Ti", 16311, (12, 0)),
        ("RTX 5070", "NVIDIA GeForce RTX 5070", 12227, (12, 0)),
        ("RTX laptop 4GB", "NVIDIA GeForce RTX laptop 4GB", 4096, (8, 6)),
        ("RTX laptop 6GB", "NVIDIA GeForce RTX laptop 6GB", 6144, (8, 6)),
        ("RTX laptop 8GB", "NVIDIA GeForce RTX laptop 8GB", 8188, (8, 9)),
        ("RTX laptop 12GB", "NVIDIA GeForce RTX laptop 12GB", 12282, (8, 9)),
        ("RTX laptop 16GB", "NVIDIA GeForce RTX laptop 16GB", 16376, (8, 9)),
    ]
}


def detect_gpu() -> Gpu:
    """The device that training would use here: the first CUDA card, else Apple's GPU, else the CPU.

    Free memory of a CUDA card is what the driver calls free (so what the desktop uses is already left out) plus what this
    very process holds in reserve, because training can use that again.
    """
    import torch

    ram = psutil.virtual_memory()
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info(0)
        held = torch.cuda.memory_reserved(0) - torch.cuda.memory_allocated(0)
        return Gpu(
            torch.cuda.get_device_name(0),
            "cuda",
            total,
            free + held,
            torch.cuda.get_device_capability(0),
            ram_free_bytes=ram.available,
            count=torch.cuda.device_count(),
        )
    if torch.backends.mps.is_available():
        return Gpu("Apple GPU (possible, slow, not tested by us)", "mps", ram.total, ram.available, ram_free_bytes=ram.available)
    threads = torch.get_num_threads()
    return Gpu(f"CPU, {threads} thread{'s' * (threads != 1)}, no GPU", "cpu", ram.total, ram.available, ram_free_bytes=ram.available)


def compute_dtype(gpu: Gpu, shape: ModelShape | None = None) -> tuple[str, str]:
    """(name of the torch dtype to calculate in, why).

    Decided by compute capability: `torch.cuda.is_bf16_supported()` answers True on a T4 because it counts slow emulation
    (pytorch#148322). Families whose activations outgrow fp16's 65504 (Gemma: transformers#36822) get fp32 where bf16 is missing.
    """
    if gpu.kind != "cuda":
        return "float32", "fp32, because 16-bit arithmetic is slow or missing without a CUDA card"
    version = f"compute capability {gpu.capability[0]}.{gpu.capability[1]}"
    if gpu.capability >= AMPERE:
        return "bfloat16", f"bf16, because {version} calculates it in hardware and it cannot overflow like fp16"
    if shape is not None and shape.has("overflows fp16"):
        return (
            "float32",
            f"fp32, because {shape.model_type} overflows fp16, and {gpu.name} ({version}) has no bf16: slow; prefer another model",
        )
    return "float16", f"fp16, because {gpu.name} ({version}) has no bf16 in hardware"


def attention(gpu: Gpu, shape: ModelShape | None = None) -> tuple[str, str]:
    """(attention kernel that will run, why): "flash", "efficient" or "math" of PyTorch's SDPA, or transformers' "eager"."""
    if shape is not None and shape.has("eager attention only"):
        return "eager", f"transformers' own, because {shape.model_type} limits its scores in a way that PyTorch's kernels cannot"
    if gpu.kind != "cuda":
        return "math", "PyTorch's own attention on this device"
    if gpu.capability >= AMPERE:
        return "flash", "flash attention inside PyTorch, for compute capability 8.0 and newer"
    return "efficient", (
        "memory-efficient attention, because flash attention needs compute capability 8.0; shared keys and values are repeated, "
        "because PyTorch would else fall back to its slow math kernel"
    )


def loss_head(gpu: Gpu) -> tuple[str, str]:
    """(how TRL's loss head will run, why): "triton" folds logits tile by tile in one kernel, "torch" keeps temporaries per tile."""
    if gpu.kind != "cuda":
        return "torch", "TRL's, in plain torch, because Triton needs a CUDA card"
    if gpu.capability < AMPERE:
        return "torch", "TRL's, in plain torch, because Triton no longer supports cards before compute capability 8.0 officially"
    if not gpu.triton:
        return "torch", "TRL's, in plain torch, because its Triton kernels failed a test on this card"
    if sys.platform == "win32" or (sys.platform == "linux" and _torch_without_triton()):
        return "torch", "TRL's, in plain torch, because Triton is not installed here"
    return "triton", "TRL's, with Triton kernels"


def _torch_without_triton() -> bool:
    """A CUDA build of torch is installed but Triton is not. (A CPU build is only used to plan for another machine.)"""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return "+cpu" not in version("torch") and importlib.util.find_spec("triton") is None
    except PackageNotFoundError:
        return False


@dataclass(frozen=True)
class Speed:
    """What a card can do by its data sheet, and how much longer real steps take."""

    teraflops: float
    """Tensor-core rate in 16 bit with fp32 sums."""
    gigabytes_per_second: float
    factor: float
    source: str
    """Where the seconds come from; empty if nothing is known about this card."""

    def seconds(self, flops: float, bytes_moved: float) -> float:
        """About how long this much work takes: arithmetic and memory traffic one after the other, times the factor."""
        return self.factor * (flops / (self.teraflops * 1e12) + bytes_moved / (self.gigabytes_per_second * 1e9))


# (TFLOP/s in 16 bit with fp32 sums, GB/s) from the makers' data sheets, rounded.
DATA_SHEETS = {
    "T4": (65, 320), "P100": (19, 732), "L4": (121, 300), "A100": (312, 1555), "RTX 2060": (26, 336), "RTX 2070": (30, 448),
    "RTX 2080 Ti": (54, 616), "RTX 3060": (25, 360), "RTX 3070": (41, 448), "RTX 3080 10GB": (60, 760), "RTX 3090": (71, 936),
    "RTX 4060": (30, 272), "RTX 4060 Ti 16GB": (44, 288), "RTX 4070": (58, 504), "RTX 4070 Ti SUPER": (88, 672),
    "RTX 4090": (165, 1008), "RTX 5060 Ti 16GB": (47, 448), "RTX 5070": (62, 672),
}  # fmt: skip
T4_FACTOR = 2.03  # fitted on 41 recorded T4 steps: `python -m benchmarks.memory_accuracy --speed`


def speed(gpu: Gpu) -> Speed:
    """What is known about this card's speed. A card without a data sheet here is ranked as a T4, which says nothing about seconds."""
    short = next((name for name, card in KNOWN_GPUS.items() if card.name == gpu.name and name in DATA_SHEETS), None)
    if short is None:
        return Speed(*DATA_SHEETS["T4"], T4_FACTOR, "")
    source = (
        "fitted on recorded T4 steps" if short == "T4" else "not measured on this card: from its data sheet and the T4's factor"
    )
    return Speed(*DATA_SHEETS[short], T4_FACTOR, source)

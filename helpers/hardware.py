"""What card is this, and what does that mean for training?

    gpu = detect_gpu()              # the card in this machine ...
    gpu = KNOWN_GPUS["T4"]          # ... or one that you do not own, to plan for it
    dtype, reason = compute_dtype(gpu)

Decisions are pure functions of a small `Gpu` and come with their reason, so they can be tested and shown without a card.
torch is imported only inside `detect_gpu`.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import platform
import sys
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    from helpers.registry import ModelShape

MIB, GIB = 2**20, 2**30
AMPERE = (8, 0)  # the first compute capability with bf16 arithmetic in hardware
EXPANDABLE = "expandable_segments:True"
WORKSPACES = (
    32 * MIB
)  # what cuBLAS and cuBLASLt keep once they have been used (16.25 MiB), and crumbs; plans count it themselves
# model_types whose activations outgrow fp16's 65504 begin with these (Gemma: transformers#36822, unsloth-zoo#866; Qwen3.5: unsloth-zoo#978).
OVERFLOW_FP16 = ("gemma", "qwen3_5")


def is_wsl(release: str | None = None) -> bool:
    """Does Linux run inside Windows here? Its kernel says so in its release, e.g. `5.15.153.1-microsoft-standard-WSL2`."""
    return "microsoft" in (platform.release() if release is None else release).lower()


def growing_segments(system: str = sys.platform, wsl: bool | None = None) -> bool:
    """Should PyTorch's allocator take memory in segments that grow (`expandable_segments`)? They leave fewer holes.

    Not on Windows, whose driver has no such call, nor under WSL, where some drivers fail at it (pytorch#192330).
    """
    return system == "linux" and not (is_wsl() if wsl is None else wsl)


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
    has_context: bool = False
    """Has the driver set this process up on the card already? Then `free_bytes` no longer holds what that takes."""
    flash: bool = sys.platform != "win32"
    """Does this PyTorch have flash attention? Its wheels for Windows have none (pytorch#186343)."""
    expandable: bool = growing_segments()
    """Does PyTorch's allocator work with segments that grow?"""
    fused_head: str = ""
    """What TRL's loss head was found to do here: "triton", "torch", or "full" where it is not what this kit knows. Empty: not tried."""

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
        ("P100", "Tesla P100-PCIE-16GB", 16276, (6, 0)),
        ("L4", "NVIDIA L4", 22700, (8, 9)),
        ("A100", "NVIDIA A100-SXM4-40GB", 40326, (8, 0)),
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
        ("RTX laptop 4GB", "NVIDIA GeForce RTX 3050 Laptop GPU", 4096, (8, 6)),
        ("RTX laptop 6GB", "NVIDIA GeForce RTX 3060 Laptop GPU", 6144, (8, 6)),
        ("RTX laptop 8GB", "NVIDIA GeForce RTX 4060 Laptop GPU", 8188, (8, 9)),
        ("RTX laptop 12GB", "NVIDIA GeForce RTX 4080 Laptop GPU", 12282, (8, 9)),
        ("RTX laptop 16GB", "NVIDIA GeForce RTX 4090 Laptop GPU", 16376, (8, 9)),
    ]
}


_loaded: weakref.ref[Any] | None = None


def count_as_free(model: Any) -> None:
    """Have `detect_gpu` count this model's memory as free: it is what will be trained, or it makes room for what will be."""
    global _loaded
    _loaded = weakref.ref(model)


def _bytes_of_loaded(device: str) -> int:
    """Bytes that the model of `count_as_free` holds on "cuda" or "cpu", with its gradients and the scales of its 4-bit weights."""
    model, sizes = _loaded() if _loaded is not None else None, {}
    for tensor in [*model.parameters(), *model.buffers()] if model is not None else ():
        state = getattr(tensor, "quant_state", None)
        inner = getattr(state, "state2", None)
        scales = [part for at in (state, inner) if at is not None for part in (at.absmax, at.code)]
        for part in (tensor, tensor.grad, getattr(state, "offset", None), *scales):
            if part is not None and part.device.type == device:
                sizes[part.untyped_storage().data_ptr()] = part.untyped_storage().nbytes()
    return sum(sizes.values())


def detect_gpu() -> Gpu:
    """The device that training would use here: the first CUDA card, else Apple's GPU, else the CPU.

    Free memory is what a training could have if it began now: what the driver calls free (so what the desktop uses is left out), what
    PyTorch keeps in reserve, and the model that this process has loaded, which is trained itself or released before the next is loaded.
    """
    import torch

    gc.collect()  # what the last training left in circles
    ram = psutil.virtual_memory()
    available = min(ram.total, ram.available + _bytes_of_loaded("cpu"))
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info(0)  # makes the context, if there was none
        others = max(0, torch.cuda.memory_allocated(0) - _bytes_of_loaded("cuda") - WORKSPACES)
        return Gpu(
            torch.cuda.get_device_name(0),
            "cuda",
            total,
            free + torch.cuda.memory_reserved(0) - others,
            torch.cuda.get_device_capability(0),
            ram_free_bytes=available,
            count=torch.cuda.device_count(),
            has_context=True,
            flash=_has_flash_attention(),
            expandable=EXPANDABLE
            in (os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or ""),
        )
    if torch.backends.mps.is_available():
        return Gpu(
            "Apple GPU (possible, slow, not tested by us)", "mps", ram.total, available, ram_free_bytes=available
        )
    threads = torch.get_num_threads()
    return Gpu(
        f"CPU, {threads} thread{'s' * (threads != 1)}, no GPU", "cpu", ram.total, available, ram_free_bytes=available
    )


def _has_flash_attention() -> bool:
    from torch.backends import cuda

    return (
        cuda.is_flash_attention_available()
        if hasattr(cuda, "is_flash_attention_available")
        else sys.platform != "win32"
    )


def compute_dtype(gpu: Gpu, model_type: str = "") -> tuple[str, str]:
    """(name of the torch dtype to calculate in, why). `model_type` is that of the model's `config.json`.

    Decided by compute capability: `torch.cuda.is_bf16_supported()` answers True on a T4 because it counts slow emulation
    (pytorch#148322). Families whose activations outgrow fp16's 65504 get fp32 where bf16 is missing.
    """
    if gpu.kind != "cuda":
        return "float32", "fp32, because 16-bit arithmetic is slow or missing without a CUDA card"
    version = f"compute capability {gpu.capability[0]}.{gpu.capability[1]}"
    if gpu.capability >= AMPERE:
        return "bfloat16", f"bf16, because {version} calculates it in hardware and it cannot overflow like fp16"
    if model_type.startswith(OVERFLOW_FP16):
        return (
            "float32",
            f"fp32, because {model_type} overflows fp16, and {gpu.name} ({version}) has no bf16: slow; prefer another model",
        )
    return "float16", f"fp16, because {gpu.name} ({version}) has no bf16 in hardware"


def attention(gpu: Gpu, shape: ModelShape | None = None) -> tuple[str, str]:
    """(attention kernel that will run, why): "flash", "efficient" or "math" of PyTorch's SDPA, or transformers' "eager"."""
    if shape is not None and shape.has("eager attention only"):
        return (
            "eager",
            f"transformers' own, because {shape.model_type} limits its scores in a way that PyTorch's kernels cannot",
        )
    if gpu.kind != "cuda":
        return "math", "PyTorch's own attention on this device"
    if gpu.capability >= AMPERE and gpu.flash:
        return "flash", "flash attention inside PyTorch, for compute capability 8.0 and newer"
    why = (
        "flash attention needs compute capability 8.0"
        if gpu.capability < AMPERE
        else "PyTorch for Windows has no flash attention"
    )
    return "efficient", (
        f"memory-efficient attention, because {why}; shared keys and values are repeated, "
        "because PyTorch would else fall back to its slow math kernel"
    )


def loss_head(gpu: Gpu) -> tuple[str, str]:
    """(how the loss will be computed, why).

    "triton": TRL's head folds logits tile by tile in one kernel. "torch": the same, with temporaries for each tile. "full": all logits at
    once, where TRL is not built as this kit knows it. On cards before Ampere, the probe before training decides between the first two
    (`helpers.compat.working_head`), and "torch", which needs more memory, is planned until then.
    """
    if gpu.fused_head == "full":
        return (
            "full",
            "all logits at once, because this version of TRL computes its loss in a way that this kit does not know",
        )
    if gpu.kind != "cuda":
        return "torch", "TRL's, in plain torch, because Triton needs a CUDA card"
    if gpu.fused_head == "torch":
        return "torch", "TRL's, in plain torch, because its Triton kernels failed a test on this card"
    if sys.platform == "win32" or (sys.platform == "linux" and _torch_without_triton()):
        return "torch", "TRL's, in plain torch, because Triton is not installed here"
    if gpu.fused_head == "triton" or gpu.capability >= AMPERE:
        return "triton", "TRL's, with Triton kernels"
    return "torch", (
        "TRL's, planned in plain torch, because Triton does not promise to work before compute capability 8.0; "
        "training tries it, and it needs less"
    )


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
    "T4": (65, 320),
    "P100": (19, 732),
    "L4": (121, 300),
    "A100": (312, 1555),
    "RTX 2060": (26, 336),
    "RTX 2070": (30, 448),
    "RTX 2080 Ti": (54, 616),
    "RTX 3060": (25, 360),
    "RTX 3070": (41, 448),
    "RTX 3080 10GB": (60, 760),
    "RTX 3090": (71, 936),
    "RTX 4060": (30, 272),
    "RTX 4060 Ti 16GB": (44, 288),
    "RTX 4070": (58, 504),
    "RTX 4070 Ti SUPER": (88, 672),
    "RTX 4090": (165, 1008),
    "RTX 5060 Ti 16GB": (47, 448),
    "RTX 5070": (62, 672),
}
T4_FACTOR = 2.03  # fitted on 41 recorded T4 steps: `python -m benchmarks.memory_accuracy --speed`


def speed(gpu: Gpu) -> Speed:
    """What is known about this card's speed. A card without a data sheet here is ranked as a T4, which says nothing about seconds.

    A card is known by its capability and by how its name begins: what follows is the variant ("-PCIE-16GB", " Laptop GPU").
    """
    sheets = {_model_name(KNOWN_GPUS[short].name): short for short in DATA_SHEETS}
    alike = [
        name
        for name, short in sheets.items()
        if KNOWN_GPUS[short].capability == gpu.capability
        and gpu.name.startswith(name)
        and not gpu.name[len(name) :][:1].isalnum()
    ]
    if not alike:
        return Speed(*DATA_SHEETS["T4"], T4_FACTOR, "")
    name = max(alike, key=len)
    short = sheets[name]
    source = f"not measured on this card: from the data sheet of {'a ' + name if name != gpu.name else 'the card'} and the T4's factor"
    return Speed(*DATA_SHEETS[short], T4_FACTOR, "fitted on recorded T4 steps" if short == "T4" else source)


def _model_name(name: str) -> str:
    """A card's name without its variant: "Tesla P100" of "Tesla P100-PCIE-16GB"."""
    return name.partition("-")[0]

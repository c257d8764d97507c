"""What card is this, and what does that mean for training?

    gpu = detect_gpu()              # the card in this machine ...
    gpu = KNOWN_GPUS["T4"]          # ... or one that you do not own, to plan for it
    dtype, reason = compute_dtype(gpu)

Decisions are pure functions of a small `Gpu` and come with their reason, so they can be tested and shown without a card.
torch is imported only inside `detect_gpu`.
"""

from __future__ import annotations

import csv
import gc
import os
import platform
import re
import sys
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import psutil

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

    from helpers.registry import ModelShape

MIB, GIB = 2**20, 2**30
AMPERE = (8, 0)  # the first compute capability with bf16 arithmetic in hardware
EXPANDABLE = "expandable_segments:True"
# What cuBLAS and cuBLASLt keep once they have been used (16.25 MiB), and crumbs; plans count it themselves.
WORKSPACES = 32 * MIB
# Model types whose activations outgrow fp16's 65504 begin with these (Gemma: transformers#36822, unsloth-zoo#866; Qwen3.5: unsloth-zoo#978).
OVERFLOW_FP16 = ("gemma", "qwen3_5")


def growing_segments(system: str = sys.platform, release: str = "") -> bool:
    """Should PyTorch's allocator take memory in segments that grow (`expandable_segments`)? They leave fewer holes.

    Not on Windows, whose driver has no such call, nor under WSL, where some drivers fail at it (pytorch#192330). WSL's kernel says so in
    its release, e.g. `5.15.153.1-microsoft-standard-WSL2`.
    """
    return system == "linux" and "microsoft" not in (release or platform.release()).lower()


@dataclass(frozen=True)
class Gpu:
    """One training device. Sizes in bytes. `kind` is "cuda", "mps" or "cpu"; for "cpu" the memory is the machine's RAM."""

    name: str
    kind: str
    total_bytes: int
    free_bytes: int
    capability: tuple[int, int] | None = None
    ram_free_bytes: int = 12 * GIB
    has_context: bool = False  # is this process set up on the card? Then `free_bytes` has left out what that takes
    flash: bool = sys.platform != "win32"  # flash attention, which PyTorch's wheels for Windows lack (pytorch#186343)
    expandable: bool = growing_segments()  # does PyTorch's allocator work with segments that grow?
    fused_head: str = ""  # what TRL's loss head was found to do here: "triton", "torch", "full"; empty: not tried

    @property
    def is_ampere(self) -> bool:
        """Is this a card of the Ampere generation, or of a newer one?"""
        return self.capability is not None and self.capability >= AMPERE

    @property
    def version(self) -> str:
        """Such as "compute capability 7.5"."""
        return "compute capability " + ".".join(map(str, self.capability or ()))

    def __str__(self) -> str:
        memory = {"cuda": "", "mps": "shared memory ", "cpu": "RAM "}[self.kind]
        size = f"{self.free_bytes / GIB:.1f} GiB {memory}free of {self.total_bytes / GIB:.1f} GiB"
        return f"{self.name}: {size}" + (f", {self.version}" if self.capability else "")


# ------------------------------------------------------------------------------------------------ cards to plan for

# Of each card in cards.csv: its name and memory as the driver reports them (a little less than the box says), TFLOP/s in 16 bit with fp32
# sums and GB/s from the makers' data sheets, rounded. Laptop cards are ranked by the desktop card of their name.
KNOWN_GPUS: dict[str, Gpu] = {}  # each taken as wholly free
DATA_SHEETS: dict[str, tuple[int, int]] = {}
with Path(__file__).with_name("cards.csv").open(encoding="utf-8", newline="") as file:
    for row in csv.DictReader(file):
        size, (major, minor) = int(row["mib"]) * MIB, map(int, row["capability"].split("."))
        KNOWN_GPUS[row["card"]] = Gpu(row["name"], "cuda", size, size, (major, minor))
        if row["teraflops"]:
            DATA_SHEETS[row["card"]] = int(row["teraflops"]), int(row["gb_per_s"])
T4_FACTOR = 2.03  # fitted on 41 recorded T4 steps: `python -m benchmarks.memory_accuracy --speed`


class Speed(NamedTuple):
    """What a card can do by its data sheet."""

    teraflops: float
    gigabytes_per_second: float
    source: str  # where the seconds come from; empty if nothing is known about this card

    def seconds(self, flops: float, bytes_moved: float) -> float:
        """About how long this much work takes: arithmetic and memory traffic one after the other, times the factor."""
        return T4_FACTOR * (flops / (self.teraflops * 1e12) + bytes_moved / (self.gigabytes_per_second * 1e9))


def speed(gpu: Gpu) -> Speed:
    """What is known about this card's speed. A card without a data sheet here is ranked as a T4, which says nothing about seconds.

    A card is known by its capability and by how its name begins: what follows is the variant ("-PCIE-16GB", " Laptop GPU").
    """
    cards = {KNOWN_GPUS[card].name.partition("-")[0]: card for card in DATA_SHEETS}
    same = [name for name, card in cards.items() if KNOWN_GPUS[card].capability == gpu.capability]
    name = max((name for name in same if re.match(re.escape(name) + r"(?!\w)", gpu.name)), key=len, default="")
    if not name:
        return Speed(*DATA_SHEETS["T4"], source="")
    whose = "the card" if name == gpu.name else f"a {name}"
    source = f"not measured on this card: from the data sheet of {whose} and the T4's factor"
    return Speed(*DATA_SHEETS[cards[name]], source="fitted on recorded T4 steps" if name == "Tesla T4" else source)


# ------------------------------------------------------------------------------------------------ the card in this machine

_loaded: weakref.ref[Any] | None = None  # weakly, so that a model which is gone is not counted


def count_as_free(model: Any) -> None:
    """Have `detect_gpu` count this model's memory as free: it is what will be trained, or it makes room for what will be."""
    global _loaded
    _loaded = weakref.ref(model)


def loaded_model() -> Any:
    """The model of the last `count_as_free`, None if it is gone."""
    return _loaded() if _loaded else None


def loaded_tensors(model: Module) -> Iterator[Tensor]:
    """Every tensor of a loaded model: parameters, buffers, and the scales and code tables of its 4-bit weights."""
    for tensor in [*model.parameters(), *model.buffers()]:
        yield tensor
        state = getattr(tensor, "quant_state", None)
        for scales in (state, getattr(state, "state2", None)):  # with double quantization, scales have scales
            parts = [getattr(scales, name, None) for name in ("absmax", "code", "offset")]
            yield from (part for part in parts if part is not None)


def _bytes_of_loaded(device: str) -> int:
    """Bytes that the loaded model holds on "cuda" or "cpu", with its gradients. Shared storages count once."""
    model, storages = loaded_model(), {}
    for tensor in loaded_tensors(model) if model is not None else ():
        for part in (tensor, tensor.grad):
            if part is not None and part.device.type == device:
                storages[part.untyped_storage().data_ptr()] = part.untyped_storage().nbytes()
    return sum(storages.values())


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
        allocator = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or ""
        return Gpu(
            torch.cuda.get_device_name(0),
            "cuda",
            total,
            free + torch.cuda.memory_reserved(0) - others,
            torch.cuda.get_device_capability(0),
            available,
            has_context=True,
            flash=torch.backends.cuda.is_flash_attention_available(),
            expandable=EXPANDABLE in allocator,
        )
    if torch.backends.mps.is_available():
        name, kind = "Apple GPU (possible, slow, not tested by us)", "mps"
    else:
        threads = torch.get_num_threads()
        name, kind = f"CPU, {threads} thread{'s' * (threads != 1)}, no GPU", "cpu"
    return Gpu(name, kind, ram.total, available, ram_free_bytes=available)


# ------------------------------------------------------------------------------------------------ decisions, each with its reason


def compute_dtype(gpu: Gpu, model_type: str = "") -> tuple[str, str]:
    """(name of the torch dtype to calculate in, why). `model_type` is that of the model's `config.json`.

    Decided by compute capability: `torch.cuda.is_bf16_supported()` answers True on a T4 because it counts slow emulation
    (pytorch#148322). Families whose activations outgrow fp16's 65504 get fp32 where bf16 is missing.
    """
    if gpu.kind != "cuda":
        return "float32", "fp32, because 16-bit arithmetic is slow or missing without a CUDA card"
    if gpu.is_ampere:
        return "bfloat16", f"bf16, because {gpu.version} calculates it in hardware and it cannot overflow like fp16"
    no_bf16 = f"{gpu.name} ({gpu.version}) has no bf16"
    if model_type.startswith(OVERFLOW_FP16):
        return "float32", f"fp32, because {model_type} overflows fp16, and {no_bf16}: slow; prefer another model"
    return "float16", f"fp16, because {no_bf16} in hardware"


def attention(gpu: Gpu, shape: ModelShape | None = None) -> tuple[str, str]:
    """(attention kernel that will run, why): "flash", "efficient" or "math" of PyTorch's SDPA, or transformers' "eager"."""
    if shape is not None and shape.has("eager attention only"):
        why = f"{shape.model_type} limits its scores in a way that PyTorch's kernels cannot"
        return "eager", f"transformers' own, because {why}"
    if gpu.kind != "cuda":
        return "math", "PyTorch's own attention on this device"
    if gpu.is_ampere and gpu.flash:
        return "flash", "flash attention inside PyTorch, for compute capability 8.0 and newer"
    missing = "flash attention needs compute capability 8.0"
    if gpu.is_ampere:
        missing = "PyTorch for Windows has no flash attention"
    repeated = "shared keys and values are repeated, because PyTorch would else fall back to its slow math kernel"
    return "efficient", f"memory-efficient attention, because {missing}; {repeated}"


def loss_head(gpu: Gpu) -> tuple[str, str]:
    """(how the loss will be computed, why).

    "triton": TRL's head folds logits tile by tile in one kernel. "torch": the same, with temporaries for each tile. "full": all logits at
    once, where TRL is not built as this kit knows it. On cards before Ampere, the probe before training decides between the first two
    (`helpers.compat.working_head`), and "torch", which needs more memory, is planned until then.
    """
    if gpu.fused_head == "full":
        why = "this version of TRL computes its loss in a way that this kit does not know"
        return "full", f"all logits at once, because {why}"
    why = ""
    if gpu.kind != "cuda":
        why = "Triton needs a CUDA card"
    elif gpu.fused_head == "torch":
        why = "its Triton kernels failed a test on this card"
    elif sys.platform == "win32" and not gpu.fused_head:
        why = "PyTorch for Windows comes without Triton"
    elif not (gpu.is_ampere or gpu.fused_head):
        why = "Triton does not promise to work before compute capability 8.0; training tries it, and it needs less"
    return ("torch", f"TRL's, in plain torch, because {why}") if why else ("triton", "TRL's, with Triton kernels")

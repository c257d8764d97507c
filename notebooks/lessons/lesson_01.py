"""Lesson 01: what a model's tensors weigh, part by part, and the charts of codebook, rounding error and footprint.

parts = stored_bytes(model)                                   # {"linear layers": ..., "scales": ..., "embedding and the rest": ...}
picture(footprint_chart({"16 bit": parts}), "Footprint")

What a cell costs: seconds, RAM of this process, and memory of the card, from a `with` block.

with Cost() as cost:
    model = AutoModelForCausalLM.from_pretrained(folder)
print(cost)

Checks for lesson 01: the size of a larger model in NF4, the price of small blocks, and NF4's codebook.
"""

from __future__ import annotations

import gc
import logging
import math
import re
import time
from collections.abc import Mapping
from threading import Event, Thread
from typing import Any

import psutil
import torch
from matplotlib.figure import Figure

from helpers.memory import GIB, MIB, nf4_bytes
from helpers.plots import BEST, MUTED, TRAIN, VALIDATION
from helpers.registry import CATALOG

# bitsandbytes would mention at each start that it misses a kernel which nothing here needs, and at each multiplication in 8 bit which
# type it calculates in.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

LINEAR, SCALES, REST = "linear layers", "scales", "embedding and the rest"
PART_COLORS = {LINEAR: TRAIN, SCALES: VALIDATION, REST: "#b5b5b5"}
HISTOGRAM_BINS = 200


def stored_bytes(model: torch.nn.Module) -> dict[str, int]:
    """Bytes of a model's tensors: weights of the linear layers, their scales, and the rest (embedding, output head, norms).

    transformers' `get_memory_footprint` leaves the scales of 4-bit weights out. The code tables (a kilobyte per layer) are left out here.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    parts, seen = dict.fromkeys(PART_COLORS, 0), set()
    for module in model.modules():
        for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            if id(tensor) in seen:  # embedding and output head are often one tensor
                continue
            seen.add(id(tensor))
            is_matrix = isinstance(module, torch.nn.Linear) and module is not head and tensor is module.weight
            parts[LINEAR if is_matrix else REST] += tensor.numel() * tensor.element_size()
            if is_matrix:
                parts[SCALES] += sum(scale.numel() * scale.element_size() for scale in _scales(module))
    return parts


def _scales(module: torch.nn.Linear) -> list[torch.Tensor]:
    """What a quantized layer keeps to turn its codes back into weights: absmax in 4 bit (and its absmax), row scales in 8 bit."""
    outer = getattr(module.weight, "quant_state", None)
    inner = getattr(outer, "state2", None)
    in_8_bit = getattr(module.weight, "SCB", None)
    if in_8_bit is None:
        in_8_bit = getattr(getattr(module, "state", None), "SCB", None)
    found = [getattr(outer, "absmax", None), getattr(inner, "absmax", None), getattr(outer, "offset", None), in_8_bit]
    return [scale for scale in found if scale is not None]


def codebook_chart(scaled: torch.Tensor, codebooks: Mapping[str, torch.Tensor]) -> Figure:
    """Histogram of weights divided by their block's absmax, with each codebook's levels drawn in, and how often each level is used.

    Args:
        scaled: weights between -1 and 1.
        codebooks: name -> its levels, in rising order.
    """
    values = scaled.detach().float().cpu().flatten()
    figure = Figure(figsize=(7.2, 2.5 * len(codebooks)), dpi=110, layout="constrained")
    rows = figure.subplots(len(codebooks), 2, squeeze=False, width_ratios=(3, 2))
    largest = 0.0
    for (left, right), (name, levels), color in zip(rows, codebooks.items(), (TRAIN, VALIDATION, BEST)):
        levels = levels.detach().float().cpu()
        left.hist(values.numpy(), bins=HISTOGRAM_BINS, range=(-1, 1), color=MUTED, alpha=0.55)
        left.vlines(levels.tolist(), 0, 1, transform=left.get_xaxis_transform(), color=color, linewidth=1.3)
        left.set_title(
            f"{name}: {len(levels)} levels over the weights", loc="left", fontsize=9.5, color=color, fontweight="bold"
        )
        left.set_yticks([])
        left.set_xticks([-1, -0.5, 0, 0.5, 1])
        left.set_ylabel("number of weights")
        shares = 100 * level_shares(values, levels)
        right.bar(range(len(levels)), shares.tolist(), color=color)
        right.axhline(100 / len(levels), color=MUTED, linestyle="--", linewidth=1)
        right.set_title("% of the weights that take each level", loc="left", fontsize=9.5)
        right.set_xticks(range(0, len(levels), 5))
        largest = max(largest, shares.max().item())
    for right in rows[:, 1]:
        right.set_ylim(0, largest * 1.1)
    rows[-1][0].set_xlabel("weight / largest absolute weight of its block")
    rows[-1][1].set_xlabel("code (dashed: equal use)")
    for axes in rows.flat:
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def level_shares(values: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Share of `values` that is nearest to each level. `levels` in rising order."""
    codes = torch.bucketize(values, (levels[1:] + levels[:-1]) / 2)
    return torch.bincount(codes.flatten(), minlength=len(levels)) / values.numel()


def error_chart(errors: Mapping[str, Mapping[str, float]], reference: float | None = None) -> Figure:
    """Rounding error of each linear layer by its depth in the model; a line through the mean of each depth.

    Args:
        errors: codebook -> (layer name -> relative error, 0 to 1).
        reference: the error that perfectly normal weights would have with the first codebook.
    """
    figure = Figure(figsize=(7.2, 3.6), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    for (label, by_name), color, marker in zip(errors.items(), (TRAIN, VALIDATION, BEST), "osD"):
        depths: dict[int, list[float]] = {}
        for name, error in by_name.items():
            depths.setdefault(int(re.search(r"\.(\d+)\.", name)[1]), []).append(100 * error)
        points = [(depth, error) for depth, found in depths.items() for error in found]
        axes.scatter(*zip(*points), s=9, color=color, alpha=0.45, marker=marker, linewidths=0)
        axes.plot(
            list(depths),
            [sum(found) / len(found) for found in depths.values()],
            color=color,
            linewidth=1.8,
            label=label,
        )
    if reference is not None:
        axes.axhline(100 * reference, color=MUTED, linestyle="--", linewidth=1.2)
        axes.annotate(
            "perfectly normal weights in NF4",
            (1, 100 * reference),
            xycoords=("axes fraction", "data"),
            xytext=(0, -4),
            textcoords="offset points",
            ha="right",
            va="top",
            fontsize=8.5,
            color=MUTED,
        )
    axes.set_ylim(bottom=0)
    axes.set_xlabel("transformer layer (a dot is one of its linear layers, the line their mean)")
    axes.set_ylabel("rounding error, % of the weights' size")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    axes.legend(frameon=False, loc="lower left")
    return figure


def footprint_chart(
    footprints: Mapping[str, Mapping[str, int]], reference: str = "16 bit", quoted: float = 4
) -> Figure:
    """One stacked bar per precision with how much smaller than `reference` it is, and a line where the quoted factor would end.

    Args:
        footprints: precision -> parts in bytes, as `stored_bytes` gives them.
    """
    figure = Figure(figsize=(7.2, 1.3 + 0.45 * len(footprints)), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    totals = {name: sum(parts.values()) / MIB for name, parts in footprints.items()}
    for row, (name, parts) in enumerate(footprints.items()):
        left = 0.0
        for part, color in PART_COLORS.items():
            width = parts.get(part, 0) / MIB
            axes.barh(
                row,
                width,
                left=left,
                height=0.66,
                color=color,
                edgecolor="white",
                linewidth=0.4,
                label=None if row else part,
            )
            left += width
        factor = totals[reference] / totals[name]
        words = (
            ""
            if name == reference
            else f" ({factor:.1f} times smaller)"
            if factor > 1
            else f" ({1 / factor:.1f} times larger)"
        )
        axes.text(left + max(totals.values()) * 0.012, row, f"{left:,.0f} MiB{words}", va="center", fontsize=8.5)
    at = totals[reference] / quoted
    axes.axvline(at, color="black", linewidth=1.2, linestyle="--")
    axes.annotate(
        f'"{quoted:g} times smaller"',
        (at, 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(3, 3),
        textcoords="offset points",
        fontsize=8.5,
    )
    axes.set_yticks(range(len(footprints)), list(footprints))
    axes.invert_yaxis()
    axes.set_xlim(0, max(totals.values()) * 1.25)
    axes.set_xlabel("MiB of tensors")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8.5)
    return figure


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


NEAR = 0.01  # of the right size
EXACT_BITS = 1e-3
NEAR_LEVEL = 2e-3  # NF4's own table was rounded on the way
BLOCKS = (32, 64, 128, 1024)


def check_nf4_size(answer: Any, model: str = "Llama-3.1-8B-Instruct") -> None:
    """Is `answer` the GiB of this model of the menu in NF4 with double quantization, and everything but its linear layers in 16 bit?"""
    if answer is None:
        return print("Your turn: replace None by a number of GiB.")
    if isinstance(answer, bool) or not isinstance(answer, (int, float)) or not math.isfinite(answer):
        return print("Not yet: the answer is a number, in GiB.")
    shape = CATALOG[model].shape
    linears, rest = shape.linear_parameters(), shape.other_parameters()
    wanted = nf4_bytes(linears) + 2 * rest

    def is_near(size: float, unit: float = GIB) -> bool:
        return abs(answer * unit - size) <= NEAR * size

    if is_near(wanted):
        factor = 2 * (linears + rest) / wanted
        return print(
            f"Right. That is {factor:.1f} times smaller than in 16 bit: nearer to the 4 that people quote than our small model, "
            "because the embedding is a smaller part of it."
        )
    hint = "add up two parts: the linear layers at their bits per weight, and everything else at two bytes."
    if is_near(wanted, 1e9):
        hint = "that is in GB (10^9 bytes). A GiB has 2^30 bytes."
    elif is_near(wanted, 1):
        hint = "that is in bytes; a GiB has 2^30 of them."
    elif is_near(2 * (linears + rest)):
        hint = "that is the whole model in 16 bit."
    elif is_near(nf4_bytes(linears + rest)) or is_near((linears + rest) / 2):
        hint = "not everything is quantized. What stays in 16 bit?"
    elif is_near(nf4_bytes(linears)):
        hint = "the linear layers are right, but they are not the whole model."
    elif is_near(linears / 2 + 2 * rest):
        hint = "nearly: each block of 64 also needs its scale."
    elif is_near(nf4_bytes(linears, double_quant=False) + 2 * rest):
        hint = "that is without double quantization."
    elif is_near(nf4_bytes(linears) + rest * 4):
        hint = "the rest is in 16 bit: two bytes for each number, not four."
    print(f"Not yet: {hint}")


def check_bits_per_weight(answer: Any) -> None:
    """Does `answer(block, double)` give the bits that a weight costs in NF4, scales included, for any block size?"""
    if answer is None:
        return print("Your turn: write the function, then hand it to the check.")
    if not callable(answer):
        return print("Not yet: the check needs the function itself, without brackets.")
    for block in BLOCKS:
        for double in (False, True):
            try:
                given = float(answer(block, double))
            except Exception as error:
                return print(f"Not yet: with a block of {block}, your function raises {type(error).__name__}: {error}.")
            wanted = 4 + ((8 + 32 / 256) / block if double else 32 / block)
            if not math.isclose(given, wanted, abs_tol=EXACT_BITS):
                return print(
                    f"Not yet, for a block of {block} {'with' if double else 'without'} double quantization: "
                    f"{_bits_hint(given, block, double)}"
                )
    print(
        "Right, for four block sizes. Small blocks round better and cost more; double quantization makes blocks of 64 nearly free."
    )


def _bits_hint(given: float, block: int, double: bool) -> str:
    if math.isclose(given, 4, abs_tol=EXACT_BITS):
        return "that is the code alone. Where does the scale go?"
    if math.isclose(given, 4 + 4 / block, abs_tol=EXACT_BITS) or math.isclose(given, 4 + 1 / block, abs_tol=EXACT_BITS):
        return "bits, not bytes."
    if double and math.isclose(given, 4 + 8 / block, abs_tol=EXACT_BITS):
        return "nearly: each 256 scales share one number of 32 bits."
    if double and math.isclose(given, 4 + 32 / block, abs_tol=EXACT_BITS):
        return "that scale is still in 32 bits."
    if not double and math.isclose(given, 4 + 16 / block, abs_tol=EXACT_BITS):
        return "a scale has 32 bits here, not 16."
    return "each weight has its code, and a share in what its whole block has to keep: divide that by the weights in the block."


def check_codebook(answer: Any) -> None:
    """Is `answer` NF4's list of 16 levels, as bitsandbytes has it?"""
    if answer is None:
        return print("Your turn: make a list of 16 levels, in rising order.")
    from bitsandbytes.functional import get_4bit_type

    try:
        levels = torch.as_tensor([float(level) for level in answer])
    except (TypeError, ValueError, RuntimeError):
        return print("Not yet: the answer is a list of numbers.")
    truth = get_4bit_type("nf4", device="cpu").float()
    if len(levels) != len(truth):
        return print(f"Not yet: four bits can name 16 levels, your list has {len(levels)}.")
    if not torch.isfinite(levels).all():
        return print(
            "Not yet: a level is infinite. Do not take the quantile of probability 0 or 1: stop a little before."
        )
    if not (levels[1:] > levels[:-1]).all():
        return print("Not yet: the levels must rise, and no two may be the same.")
    if torch.allclose(levels, truth, atol=NEAR_LEVEL):
        return print(
            "Right: the very levels that bitsandbytes uses. No training data went into them, only the shape of the bell curve."
        )
    if not torch.isclose(levels.abs().max(), torch.tensor(1.0)):
        hint = "the outermost levels must be -1 and 1, because absmax has scaled every block to that range."
    elif not (levels.abs() < NEAR_LEVEL).any():
        hint = "one level must be exactly 0, so that a weight of zero stays zero."
    elif torch.allclose(levels[1:] - levels[:-1], (levels[1:] - levels[:-1]).mean(), atol=NEAR_LEVEL):
        hint = "these are even steps. Take quantiles of the normal distribution instead."
    elif (levels < -NEAR_LEVEL).sum() == 8:
        hint = "the spare level belongs to the other side: 7 below zero, 8 above."
    elif (levels < -NEAR_LEVEL).sum() != 7:
        hint = "count: 7 levels below zero, zero itself, 8 above."
    else:
        hint = "the count is right, the places are not. Are the probabilities even steps between one half and the given one, on each side?"
    print(f"Not yet: {hint}")

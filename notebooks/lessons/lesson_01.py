"""Lesson 01: what a quantized model weighs, part by part; what loading it costs; and the checks of the exercises.

parts = stored_bytes(model)                        # {"linear layers": ..., "scales": ..., "embedding and the rest": ...}
picture(footprint_chart({"16 bit": parts}), "Footprint")
with Cost() as cost:                               # seconds, RAM of this process, memory of the card
    model = AutoModelForCausalLM.from_pretrained(folder)
"""

from __future__ import annotations

import gc
import logging
import math
import re
import time
from collections.abc import Callable, Mapping
from threading import Event, Thread
from typing import Any

import psutil
import torch
from matplotlib.figure import Figure

from helpers.hardware import GIB, MIB
from helpers.memory import nf4_bytes
from helpers.plots import BEST, MUTED, TRAIN, VALIDATION
from helpers.registry import CATALOG
from notebooks.lessons.scaffold import (
    NotYet,
    attempt,
    bare_axes,
    bare_figure,
    exercise,
    function,
    note,
    number,
    tidy,
)

# bitsandbytes would mention at each start that it misses a kernel which nothing here needs, and at each multiplication in 8 bit which
# type it calculates in.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

LINEAR, SCALES, REST = "linear layers", "scales", "embedding and the rest"
PART_COLORS = {LINEAR: TRAIN, SCALES: VALIDATION, REST: "#b5b5b5"}
HISTOGRAM_BINS = 200
SECONDS_BETWEEN_LOOKS = 0.005

NEAR = 0.01  # of the right size
EXACT_BITS = 1e-3
NEAR_LEVEL = 2e-3  # NF4's own table was rounded on the way
BLOCKS = (32, 64, 128, 1024)


# ------------------------------------------------------------------------------------------- bytes


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
            parts[LINEAR if is_matrix else REST] += tensor.nbytes
            if is_matrix:
                parts[SCALES] += sum(scale.nbytes for scale in _scales(module))
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
        before, peak, after = (f"{size / MIB:,.0f}" for size in (self.ram_before, self.ram_peak, self.ram_after))
        words = f"{self.seconds:.1f} s; RAM of this process {before} before, {peak} at the peak, {after} after (MiB)"
        if torch.cuda.is_available():
            words += f"; on the card {self.gpu_before / MIB:,.0f} before, {self.gpu_peak / MIB:,.0f} at the peak"
        return words


def _ram() -> int:
    return psutil.Process().memory_info().rss


# ------------------------------------------------------------------------------------------- charts


def codebook_chart(scaled: torch.Tensor, codebooks: Mapping[str, torch.Tensor]) -> Figure:
    """Histogram of weights divided by their block's absmax, with each codebook's levels drawn in, and how often each level is used.

    Args:
        scaled: weights between -1 and 1.
        codebooks: name -> its levels, in rising order.
    """
    values = scaled.detach().float().cpu().flatten()
    figure = bare_figure(7.2, 2.5 * len(codebooks))
    rows = figure.subplots(len(codebooks), 2, squeeze=False, width_ratios=(3, 2))
    largest = 0.0
    for (left, right), (name, levels), color in zip(rows, codebooks.items(), (TRAIN, VALIDATION, BEST)):
        levels = levels.detach().float().cpu()
        left.hist(values.numpy(), bins=HISTOGRAM_BINS, range=(-1, 1), color=MUTED, alpha=0.55)
        left.vlines(levels.tolist(), 0, 1, transform=left.get_xaxis_transform(), color=color, linewidth=1.3)
        title = f"{name}: {len(levels)} levels over the weights"
        left.set_title(title, loc="left", fontsize=9.5, color=color, fontweight="bold")
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
        tidy(axes, grid=False)
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
    figure, axes = bare_axes(7.2, 3.6)
    for (label, by_name), color, marker in zip(errors.items(), (TRAIN, VALIDATION, BEST), "osD"):
        depths: dict[int, list[float]] = {}
        for name, error in by_name.items():
            depths.setdefault(int(re.search(r"\.(\d+)\.", name)[1]), []).append(100 * error)
        points = [(depth, error) for depth, found in depths.items() for error in found]
        axes.scatter(*zip(*points), s=9, color=color, alpha=0.45, marker=marker, linewidths=0)
        means = [sum(found) / len(found) for found in depths.values()]
        axes.plot(list(depths), means, color=color, linewidth=1.8, label=label)
    if reference is not None:
        axes.axhline(100 * reference, color=MUTED, linestyle="--", linewidth=1.2)
        looks = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "top", "color": MUTED}
        note(axes, "perfectly normal weights in NF4", (1, 100 * reference), (0, -4), **looks)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("transformer layer (a dot is one of its linear layers, the line their mean)")
    axes.set_ylabel("rounding error, % of the weights' size")
    axes.legend(frameon=False, loc="lower left")
    return figure


def footprint_chart(
    footprints: Mapping[str, Mapping[str, int]], reference: str = "16 bit", quoted: float = 4
) -> Figure:
    """One stacked bar per precision with how much smaller than `reference` it is, and a line where the quoted factor would end.

    Args:
        footprints: precision -> parts in bytes, as `stored_bytes` gives them.
    """
    figure, axes = bare_axes(7.2, 1.3 + 0.45 * len(footprints))
    axes.grid(False)
    totals = {name: sum(parts.values()) / MIB for name, parts in footprints.items()}
    looks = {"height": 0.66, "edgecolor": "white", "linewidth": 0.4}
    for row, (name, parts) in enumerate(footprints.items()):
        left = 0.0
        for part, color in PART_COLORS.items():
            width = parts.get(part, 0) / MIB
            axes.barh(row, width, left=left, color=color, label=None if row else part, **looks)
            left += width
        factor = totals[reference] / totals[name]
        smaller = f"{factor:.1f} times smaller" if factor > 1 else f"{1 / factor:.1f} times larger"
        words = f"{left:,.0f} MiB" + ("" if name == reference else f" ({smaller})")
        axes.text(left + max(totals.values()) * 0.012, row, words, va="center", fontsize=8.5)
    at = totals[reference] / quoted
    axes.axvline(at, color="black", linewidth=1.2, linestyle="--")
    note(axes, f'"{quoted:g} times smaller"', (at, 1.0), (3, 3), xycoords=("data", "axes fraction"))
    axes.set_yticks(range(len(footprints)), list(footprints))
    axes.invert_yaxis()
    axes.set_xlim(0, max(totals.values()) * 1.25)
    axes.set_xlabel("MiB of tensors")
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8.5)
    return figure


# ------------------------------------------------------------------------------------------- checks of the exercises


@exercise("a number, in GiB", number)
def check_nf4_size(answer: float, model: str = "Llama-3.1-8B-Instruct") -> str:
    """Is `answer` the GiB of this model of the menu in NF4 with double quantization, and everything but its linear layers in 16 bit?"""
    shape = CATALOG[model].shape
    linears, rest = shape.linear_parameters(), shape.other_parameters()
    wanted = nf4_bytes(linears) + 2 * rest

    def is_near(size: float, unit: float = GIB) -> bool:
        return abs(answer * unit - size) <= NEAR * size

    if is_near(wanted):
        factor = 2 * (linears + rest) / wanted
        return f"Right. That is {factor:.1f} times smaller than in 16 bit: the embedding is a smaller part than in our small model."
    all_in_4_bit = is_near(nf4_bytes(linears + rest)) or is_near((linears + rest) / 2)
    raise NotYet.because(
        (is_near(wanted, 1e9), "that is in GB (10^9 bytes). A GiB has 2^30 bytes."),
        (is_near(wanted, 1), "that is in bytes; a GiB has 2^30 of them."),
        (is_near(2 * (linears + rest)), "that is the whole model in 16 bit."),
        (all_in_4_bit, "not everything is quantized. What stays in 16 bit?"),
        (is_near(nf4_bytes(linears)), "the linear layers are right, but they are not the whole model."),
        (is_near(linears / 2 + 2 * rest), "nearly: each block of 64 also needs its scale."),
        (is_near(nf4_bytes(linears, double_quant=False) + 2 * rest), "that is without double quantization."),
        (is_near(nf4_bytes(linears) + rest * 4), "the rest is in 16 bit: two bytes for each number, not four."),
        otherwise="add up two parts: the linear layers at their bits per weight, and everything else at two bytes.",
    )


@exercise("the function itself, without brackets", function)
def check_bits_per_weight(answer: Callable[[int, bool], Any]) -> str:
    """Does `answer(block, double)` give the bits that a weight costs in NF4, scales included, for any block size?"""
    for block in BLOCKS:
        for double in (False, True):
            given = attempt(
                lambda block=block, double=double: float(answer(block, double)), f"with a block of {block}, "
            )
            if not math.isclose(given, 4 + _scale_bits(double) / block, abs_tol=EXACT_BITS):
                raise _bits_hint(given, block, double)
    return "Right, for four block sizes. Small blocks round better and cost more; double quantization makes blocks of 64 nearly free."


def _scale_bits(double: bool) -> float:
    return 8 + 32 / 256 if double else 32


def _bits_hint(given: float, block: int, double: bool) -> NotYet:
    def is_near(bits_of_scale: float) -> bool:
        return math.isclose(given, 4 + bits_of_scale / block, abs_tol=EXACT_BITS)

    case = f"for a block of {block} {'with' if double else 'without'} double quantization: "
    return NotYet.because(
        (is_near(0), case + "that is the code alone. Where does the scale go?"),
        (is_near(4) or is_near(1), case + "bits, not bytes."),
        (double and is_near(8), case + "nearly: each 256 scales share one number of 32 bits."),
        (double and is_near(32), case + "that scale is still in 32 bits."),
        (not double and is_near(16), case + "a scale has 32 bits here, not 16."),
        otherwise=case + "each weight has its code and a share in what its block keeps: divide that by its weights.",
    )


@exercise("a list of 16 levels, in rising order")
def check_codebook(answer: Any) -> str:
    """Is `answer` NF4's list of 16 levels, as bitsandbytes has it?"""
    from bitsandbytes.functional import get_4bit_type

    try:
        levels = torch.as_tensor([float(level) for level in answer])
    except (TypeError, ValueError, RuntimeError):
        raise NotYet("the answer is a list of numbers.") from None
    truth = get_4bit_type("nf4", device="cpu").float()
    if len(levels) != len(truth):
        raise NotYet(f"four bits can name 16 levels, your list has {len(levels)}.")
    if not torch.isfinite(levels).all():
        raise NotYet("a level is infinite. Do not take the quantile of probability 0 or 1: stop a little before.")
    steps = levels[1:] - levels[:-1]
    if not (steps > 0).all():
        raise NotYet("the levels must rise, and no two may be the same.")
    if torch.allclose(levels, truth, atol=NEAR_LEVEL):
        return "Right: the very levels that bitsandbytes uses. No training data went into them, only the shape of the bell curve."
    below = (levels < -NEAR_LEVEL).sum()
    raise NotYet.because(
        (abs(levels.abs().max() - 1) > 1e-5, "the outermost levels must be -1 and 1: absmax has scaled to that range."),
        (not (levels.abs() < NEAR_LEVEL).any(), "one level must be exactly 0, so that a weight of zero stays zero."),
        ((steps - steps.mean()).abs().max() < NEAR_LEVEL, "these are even steps. Take quantiles of the bell curve."),
        (below == 8, "the spare level belongs to the other side: 7 below zero, 8 above."),
        (below != 7, "count: 7 levels below zero, zero itself, 8 above."),
        otherwise="the count is right, the places are not. Are the probabilities even steps on each side?",
    )

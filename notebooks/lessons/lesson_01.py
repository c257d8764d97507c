"""Lesson 01: what a quantized model weighs, part by part; what loading it costs; and the checks of the exercises.

parts = stored_bytes(model)                        # {"linear layers": ..., "scales": ..., "embedding and the rest": ...}
picture(footprint_chart({"16 bit": parts}), "Footprint")
with Cost() as cost:                               # seconds, RAM of this process, memory of the card
    model = AutoModelForCausalLM.from_pretrained(folder)
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Mapping
from threading import Event, Thread
from typing import Any

import numpy as np
import pandas as pd
import psutil
import torch
from matplotlib.figure import Figure

from helpers.hardware import GIB, MIB
from helpers.memory import nf4_bytes
from helpers.plots import BEST, MUTED, TRAIN, VALIDATION
from helpers.registry import CATALOG
from notebooks.lessons.scaffold import NotYet, alike, attempt, chart, exercise, level, must_be, number, tensor

# It would mention that it misses a kernel which nothing here needs, and at each multiplication in 8 bit its type.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

LINEAR, SCALES, REST = "linear layers", "scales", "embedding and the rest"
PART_COLORS = {LINEAR: TRAIN, SCALES: VALIDATION, REST: "#b5b5b5"}


def stored_bytes(model: torch.nn.Module) -> dict[str, int]:
    """Bytes of a model's tensors: weights of the linear layers, their scales, and the rest (embedding, output head, norms).

    transformers' `get_memory_footprint` leaves the scales of 4-bit weights out. The code tables (a kilobyte per layer) are left out here.
    """
    head, linear = model.get_output_embeddings(), set()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and module is not head:
            linear.add(f"{name}.weight")
    # Embedding and output head are often one tensor, and count once.
    stored = {id(part): (name, part) for name, part in model.state_dict(keep_vars=True).items()}
    parts = dict.fromkeys(PART_COLORS, 0)
    for name, part in stored.values():
        if name.endswith(("absmax", "SCB")):  # scales of blocks, and of these scales; in 8 bit, of rows
            parts[SCALES] += part.nbytes
        elif "quant_" not in name and not name.endswith("weight_format"):
            parts[LINEAR if name in linear else REST] += part.nbytes
    return parts


class Cost:
    """Measures its `with` block. RAM is looked at many times a second, so a very short peak may be missed. Sizes in bytes."""

    seconds = 0.0
    gpu_before = gpu_peak = 0

    def __enter__(self) -> Cost:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # what was asked for before belongs to nobody's cost but its own
            torch.cuda.reset_peak_memory_stats()
            self.gpu_before = torch.cuda.memory_allocated()
        self.ram, self._over = [psutil.Process().memory_info().rss], Event()
        self._watcher = Thread(target=self._watch, daemon=True)
        self._watcher.start()
        self._started = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            self.gpu_peak = torch.cuda.max_memory_allocated()
        self.seconds = time.perf_counter() - self._started
        self._over.set()
        self._watcher.join()

    def _watch(self) -> None:
        while not self._over.wait(0.005):  # seconds
            self.ram.append(psutil.Process().memory_info().rss)

    def __str__(self) -> str:
        before, peak, after = (f"{size / MIB:,.0f}" for size in (self.ram[0], max(self.ram), self.ram[-1]))
        words = f"{self.seconds:.1f} s; RAM of this process {before} before, {peak} at the peak, {after} after (MiB)"
        if torch.cuda.is_available():
            words += f"; on the card {self.gpu_before / MIB:,.0f} before, {self.gpu_peak / MIB:,.0f} at the peak"
        return words


@chart
def codebook_chart(scaled: torch.Tensor, codebooks: Mapping[str, torch.Tensor]) -> Figure:
    """Histogram of weights divided by their block's absmax, with each codebook's levels, and how often each level is used.

    `scaled` are weights between -1 and 1, a codebook's levels are in rising order.
    """
    values = scaled.detach().float().cpu().flatten().numpy()
    figure = Figure(figsize=(7.2, 2.5 * len(codebooks)))
    rows = figure.subplots(len(codebooks), 2, squeeze=False, sharey="col", width_ratios=(3, 2))
    for (left, right), (name, levels), color in zip(rows, codebooks.items(), (TRAIN, VALIDATION, BEST)):
        levels = levels.detach().float().cpu().numpy()
        left.hist(values, bins=200, range=(-1, 1), color=MUTED, alpha=0.55)
        left.vlines(levels, 0, 1, transform=left.get_xaxis_transform(), color=color, linewidth=1.3)
        left.set_title(f"{name}: {len(levels)} levels over the weights", color=color, fontweight="bold", fontsize=9.5)
        left.set(yticks=[], xticks=[-1, -0.5, 0, 0.5, 1], ylabel="number of weights")
        borders = (levels[1:] + levels[:-1]) / 2  # halfway between two levels
        counts, _ = np.histogram(values, [-np.inf, *borders, np.inf])
        right.bar(range(len(levels)), 100 * counts / len(values), color=color)
        right.axhline(100 / len(levels), color=MUTED, linestyle="--", linewidth=1)
        right.set_title("% of the weights that take each level", fontsize=9.5)
        right.set_xticks(range(0, len(levels), 5))
        right.grid(False)
    left.set_xlabel("weight / largest absolute weight of its block")
    right.set_xlabel("code (dashed: equal use)")
    return figure


@chart
def error_chart(errors: Mapping[str, Mapping[str, float]], reference: float) -> Figure:
    """Rounding error of each linear layer by its depth in the model; a line through the mean of each depth.

    `errors` is codebook -> (layer name -> error, 0 to 1), `reference` the error of normal weights with the first codebook.
    """
    figure = Figure(figsize=(7.2, 3.6))
    axes = figure.add_subplot(ylabel="rounding error, % of the weights' size")
    axes.set_xlabel("transformer layer (a dot is one of its linear layers, the line their mean)")
    for (label, by_name), color, marker in zip(errors.items(), (TRAIN, VALIDATION, BEST), "osD"):
        percent = 100 * pd.Series(by_name)
        depths = percent.index.str.extract(r"\.(\d+)\.", expand=False).astype(int)
        axes.scatter(depths, percent, s=9, color=color, alpha=0.45, marker=marker, linewidths=0)
        axes.plot(percent.groupby(depths).mean(), color=color, label=label)
    level(axes, 100 * reference, "perfectly normal weights in NF4")
    axes.set_ylim(bottom=0)
    axes.legend(loc="lower left")
    return figure


@chart
def footprint_chart(footprints: Mapping[str, Mapping[str, int]]) -> Figure:
    """One stacked bar per precision (parts as `stored_bytes` gives them), and a line where "4 times smaller" would end."""
    sizes = pd.DataFrame(footprints).T.reindex(columns=list(PART_COLORS)).fillna(0) / MIB
    ends, totals = sizes.cumsum(axis=1), sizes.sum(axis=1)
    figure = Figure(figsize=(7.2, 1.3 + 0.45 * len(sizes)))
    axes = figure.add_subplot(xlabel="MiB of tensors", xlim=(0, totals.max() * 1.25))
    for part, color in PART_COLORS.items():  # without edges, which would hide the thin bar of the scales
        starts = ends[part] - sizes[part]
        bars = axes.barh(sizes.index, sizes[part], 0.66, starts, color=color, label=part)
    factors = totals["16 bit"] / totals
    smaller = factors.map(
        lambda factor: f"{factor:.1f} times smaller" if factor > 1 else f"{1 / factor:.1f} times larger"
    )
    words = totals.map("{:,.0f} MiB".format) + (" (" + smaller + ")").where(factors != 1, "")
    axes.bar_label(bars, words, padding=4, fontsize=8.5)
    quarter = totals["16 bit"] / 4
    axes.axvline(quarter, color="black", linewidth=1.2, linestyle="--")
    axes.text(quarter, 1.02, ' "4 times smaller"', fontsize=8.5, transform=axes.get_xaxis_transform())
    axes.invert_yaxis()
    axes.grid(False)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.legend(loc="outside lower center", ncols=3)
    return figure


# ------------------------------------------------------------------------------------------- checks of the exercises

BLOCKS = torch.tensor([64, 32, 128, 1024])  # weights that share a scale
NEAR_LEVEL = 2e-3  # NF4's own table was rounded on the way


@exercise("a number, in GiB", number)
def check_nf4_size(answer: float) -> str:
    """Is `answer` the GiB of Llama-3.1-8B in NF4 with double quantization, and everything but its linear layers in 16 bit?"""
    shape = CATALOG["Llama-3.1-8B-Instruct"].shape
    linears, rest = shape.linear_parameters(), shape.other_parameters()
    whole, wanted = linears + rest, nf4_bytes(linears) + 2 * rest
    not_all = "not everything is quantized. What stays in 16 bit?"
    slips = [
        (wanted * GIB / 1e9, "that is in GB (10^9 bytes). A GiB has 2^30 bytes."),
        (wanted * GIB, "that is in bytes; a GiB has 2^30 of them."),
        (2 * whole, "that is the whole model in 16 bit."),
        (nf4_bytes(whole), not_all),
        (whole / 2, not_all),
        (nf4_bytes(linears), "the linear layers are right, but they are not the whole model."),
        (linears / 2 + 2 * rest, "nearly: each block of 64 also needs its scale."),
        (nf4_bytes(linears, double_quant=False) + 2 * rest, "that is without double quantization."),
        (nf4_bytes(linears) + 4 * rest, "the rest is in 16 bit: two bytes for each number, not four."),
    ]
    otherwise = "add up two parts: the linear layers at their bits per weight, and everything else at two bytes."
    must_be(answer * GIB, wanted, slips, otherwise, within=0.01)
    return f"Right. That is {2 * whole / wanted:.1f} times smaller than in 16 bit: the embedding is a smaller part than in our small model."


@exercise()
def check_bits_per_weight(answer: Callable[[int, bool], Any]) -> str:
    """Does `answer(block, double)` give the bits that a weight costs in NF4, scales included, for any block size?

    A hint is about all block sizes together: for a single one, two different mistakes may give the same number.
    """
    for double in (False, True):
        given = [
            attempt(answer, block, double, kind=float, where=f"with a block of {block}, ") for block in BLOCKS.tolist()
        ]
        scale = 8 + 32 / 256 if double else 32  # bits for each block
        slips = [(0, "that is the code alone. Where does the scale go?"), (scale / 8, "bits, not bytes.")]
        if double:
            slips += [(8, "nearly: each 256 scales share one number."), (32, "that scale is still in 32 bits.")]
        else:
            slips += [(16, "a scale has 32 bits here, not 16.")]
        case = f"{'with' if double else 'without'} double quantization: "
        wrong = [(4 + bits / BLOCKS, case + hint) for bits, hint in slips]
        wrong += [(given[:1] * len(given), f"{case}the same for each size of block. Who shares a scale?")]
        otherwise = f"{case}each weight has its code, and a share in what its block keeps."
        must_be(given, 4 + scale / BLOCKS, wrong, otherwise, within=2e-4)  # three decimals will do
    return "Right, for four block sizes. Small blocks round better and cost more; double quantization makes blocks of 64 nearly free."


@exercise("a list of 16 levels, in rising order", tensor)
def check_codebook(levels: torch.Tensor) -> str:
    """Is the answer NF4's list of 16 levels, as bitsandbytes has it?"""
    from bitsandbytes.functional import get_4bit_type

    truth, levels = get_4bit_type("nf4", device="cpu"), levels.flatten()
    if len(levels) != len(truth):
        raise NotYet(f"four bits can name 16 levels, your list has {len(levels)}.")
    steps, below = levels.diff(), (levels < -NEAR_LEVEL).sum()
    if not (levels - tensor(truth)).abs().max() <= NEAR_LEVEL:
        raise NotYet.because(
            (not levels.isfinite().all(), "a level is infinite. Which quantile is? Stop a little before that."),
            (not (steps > 0).all(), "the levels must rise, and no two may be the same."),
            (
                not alike(levels.abs().max(), 1),
                "the outermost levels must be -1 and 1: absmax has scaled to that range.",
            ),
            (levels.abs().min() >= NEAR_LEVEL, "one level must be exactly 0, so that a weight of zero stays zero."),
            (steps.max() - steps.min() < NEAR_LEVEL, "these are even steps. Take quantiles of the bell curve."),
            (below == 8, "the spare level belongs to the other side: 7 below zero, 8 above."),
            (below != 7, "count: 7 levels below zero, zero itself, 8 above."),
            otherwise="the count is right, the places are not. Are the probabilities even steps on each side?",
        )
    return "Right: the very levels that bitsandbytes uses. No training data went into them, only the shape of the bell curve."

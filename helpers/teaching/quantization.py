"""Lesson 01: what a model's tensors weigh, part by part, and the charts of codebook, rounding error and footprint.

parts = stored_bytes(model)                                   # {"linear layers": ..., "scales": ..., "embedding and the rest": ...}
picture(footprint_chart({"16 bit": parts}), "Footprint")
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping

import torch
from matplotlib.figure import Figure

from helpers.charts import BEST, MUTED, TRAIN, VALIDATION
from helpers.memory import MIB

# bitsandbytes would mention at each start that it misses a kernel which nothing here needs, and at each multiplication in 8 bit which
# type it calculates in.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

LINEAR, SCALES, REST = "linear layers", "scales", "embedding and the rest"
PART_COLOURS = {LINEAR: TRAIN, SCALES: VALIDATION, REST: "#b5b5b5"}
HISTOGRAM_BINS = 200


def stored_bytes(model: torch.nn.Module) -> dict[str, int]:
    """Bytes of a model's tensors: weights of the linear layers, their scales, and the rest (embedding, output head, norms).

    transformers' `get_memory_footprint` leaves the scales of 4-bit weights out. The code tables (a kilobyte per layer) are left out here.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    parts, seen = dict.fromkeys(PART_COLOURS, 0), set()
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
    """What a quantised layer keeps to turn its codes back into weights: absmax in 4 bit (and its absmax), row scales in 8 bit."""
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
    for (left, right), (name, levels), colour in zip(rows, codebooks.items(), (TRAIN, VALIDATION, BEST)):
        levels = levels.detach().float().cpu()
        left.hist(values.numpy(), bins=HISTOGRAM_BINS, range=(-1, 1), color=MUTED, alpha=0.55)
        left.vlines(levels.tolist(), 0, 1, transform=left.get_xaxis_transform(), color=colour, linewidth=1.3)
        left.set_title(
            f"{name}: {len(levels)} levels over the weights", loc="left", fontsize=9.5, color=colour, fontweight="bold"
        )
        left.set_yticks([])
        left.set_xticks([-1, -0.5, 0, 0.5, 1])
        left.set_ylabel("number of weights")
        shares = 100 * level_shares(values, levels)
        right.bar(range(len(levels)), shares.tolist(), color=colour)
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
    for (label, by_name), colour, marker in zip(errors.items(), (TRAIN, VALIDATION, BEST), "osD"):
        depths: dict[int, list[float]] = {}
        for name, error in by_name.items():
            depths.setdefault(int(re.search(r"\.(\d+)\.", name)[1]), []).append(100 * error)
        points = [(depth, error) for depth, found in depths.items() for error in found]
        axes.scatter(*zip(*points), s=9, color=colour, alpha=0.45, marker=marker, linewidths=0)
        axes.plot(
            list(depths),
            [sum(found) / len(found) for found in depths.values()],
            color=colour,
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
        for part, colour in PART_COLOURS.items():
            width = parts.get(part, 0) / MIB
            axes.barh(
                row,
                width,
                left=left,
                height=0.66,
                color=colour,
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

"""Checks for lesson 01: the size of a larger model in NF4, the price of small blocks, and NF4's codebook."""

from __future__ import annotations

import math
from typing import Any

import torch

from helpers.catalog import CATALOG
from helpers.memory import GIB, nf4_bytes

NEAR = 0.01  # of the right size
EXACT_BITS = 1e-3
NEAR_LEVEL = 2e-3  # NF4's own table was rounded on the way
BLOCKS = (32, 64, 128, 1024)


def check_nf4_size(answer: Any, model: str = "Llama-3.1-8B-Instruct") -> None:
    """Is `answer` the GiB of this model of the menu in NF4 with double quantisation, and everything but its linear layers in 16 bit?"""
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
        hint = "not everything is quantised. What stays in 16 bit?"
    elif is_near(nf4_bytes(linears)):
        hint = "the linear layers are right, but they are not the whole model."
    elif is_near(linears / 2 + 2 * rest):
        hint = "nearly: each block of 64 also needs its scale."
    elif is_near(nf4_bytes(linears, double_quant=False) + 2 * rest):
        hint = "that is without double quantisation."
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
                    f"Not yet, for a block of {block} {'with' if double else 'without'} double quantisation: "
                    f"{_bits_hint(given, block, double)}"
                )
    print(
        "Right, for four block sizes. Small blocks round better and cost more; double quantisation makes blocks of 64 nearly free."
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

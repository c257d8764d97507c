"""How large a micro-batch may be, and how long it takes, in each mode of checkpointing: what `helpers.cutting` cuts a step by.

A mode's ladder says how many examples of which length fit. Memory is not exactly examples times tokens (the mask of attention grows with the
square, the allocator rounds), so the formula draws the ladder, and dry runs of its two ends settle it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import replace
from math import gcd
from typing import NamedTuple

from helpers.config import TrainConfig
from helpers.cutting import TOKENS_PER_PAIR, TOKENS_PER_PASS, Mode
from helpers.dryrun import Peak, measure_once
from helpers.hardware import MIB, speed
from helpers.memory import flops_and_bytes
from helpers.plan import Plan, estimate_of, step_of
from helpers.registry import ModelShape

CHECKPOINTING = ("off", "selective", "on")  # quickest first
MOST_EXAMPLES = 256  # at once: beyond that, a pass over the weights costs next to nothing
SHORTEST = 16  # tokens: a ladder need not say how many examples fit that are shorter
CPU_MICRO_BATCH = (
    2  # of the longest examples, or as many tokens in any shape: more pays nothing without a GPU, and costs memory
)
CPU_PASS, CPU_PAIR = (
    40.0,
    0.0004,
)  # what a CPU's micro-batch costs besides its tokens, per pass and per pair of tokens, in tokens
HOST_SHARE = 0.8  # of the free RAM may hold activations
PINNED_ROUNDING = 2  # host buffers that a card can reach are rounded up to powers of two: at most twice the bytes
HOST_BYTES_PER_SECOND = 7.9e9  # of PCI Express 3.0 with eight lanes, by its specification
# What the allocator reserves besides the formula's bytes, as a share of the budget: a first guess, which dry runs replace.
UNKNOWN, TRIES = {"off": 0.015, "selective": 0.06, "on": 0.06}, 4
SAMPLES = ((2, 64), (4, 256), (2, 1024))  # micro-batches whose work tells passes, tokens and pairs of tokens apart
Size = tuple[int, int]  # of a micro-batch: examples, tokens of the longest


class Ladder(NamedTuple):
    """The steps of a `Mode`, the bytes of the card that the largest micro-batch on them takes, and dry runs of it."""

    steps: tuple[Size, ...]
    peak_bytes: int
    runs: dict[Size, Peak]


def modes_that_fit(config: TrainConfig, plan: Plan, shape: ModelShape, exact: bool) -> list[tuple[Mode, int]]:
    """Each mode with room for any example, and the bytes of its largest micro-batch; up to the first that has room for a whole step.

    Activations wait in host memory only where the longest example fits in no other way.

    Args:
        plan: with micro-batch 1; its length is that of the longest example.
        exact: let dry runs settle what the formula draws.
    """
    cuda, wanted, share = plan.gpu.kind == "cuda", config.gradient_checkpointing, plan.accumulation
    most = min(share, MOST_EXAMPLES if cuda else CPU_MICRO_BATCH)
    if config.micro_batch_size:
        most = gcd(config.micro_batch_size, share)
    found: list[tuple[Mode, int]] = []

    def fits(examples: int) -> bool:
        return any(mode.most_examples(plan.seq_len) >= examples for mode, _ in found)

    kinds = [(kind, False) for kind in (CHECKPOINTING if cuda else ("off", "on")) if wanted in ("auto", kind)]
    if cuda and wanted != "off":  # without checkpointing, tens of gigabytes would have to wait
        kinds.append(("on", True))
    for kind, offload in kinds:
        if fits(1) if offload else fits(most):
            continue
        about = replace(plan, checkpointing=kind, offload=offload)
        ladder = _ladder(config, about, shape, most, exact)
        if ladder is not None:
            costs = _costs(config, about, shape, ladder.runs)
            found.append((Mode(kind, offload, ladder.steps, *costs), ladder.peak_bytes))
    return found


def evaluation_mode(config: TrainConfig, plan: Plan, shape: ModelShape, exact: bool, training: Mode) -> Mode | None:
    """The mode of evaluation, which keeps no activations: by the formula, as if all but two layers' were in host memory.

    Its costs are those of `training`: only the ratio of passes and tokens matters here, and that hardly differs.
    """
    about = replace(plan, checkpointing="on", offload=True)
    ladder = _ladder(config, about, shape, min(config.max_eval_samples, MOST_EXAMPLES), exact, "evaluate")
    return replace(training, checkpointing="off", offload=False, ladder=ladder.steps) if ladder else None


def host_bytes(config: TrainConfig, plan: Plan, shape: ModelShape) -> int:
    """Activations that wait in host memory when the plan offloads them: what would otherwise be saved on the card."""
    return PINNED_ROUNDING * estimate_of(config, replace(plan, offload=False), shape).parts["saved activations"]


# ------------------------------------------------------------------------------------------------ one ladder


def _ladder(
    config: TrainConfig, plan: Plan, shape: ModelShape, most: int, exact: bool, phase: str = "train"
) -> Ladder | None:
    """The ladder of the plan's mode; None if nothing fits. Dry runs tell what the formula does not know until both ends fit."""
    unknown = int(UNKNOWN[plan.checkpointing] * plan.budget) if exact else 0
    for _ in range(TRIES):
        steps = _by_formula(config, plan, shape, most, plan.budget - unknown, phase)
        if not steps:
            break
        guesses = {step[::-1]: _formula_bytes(config, plan, shape, *step[::-1]) for step in (steps[0], *steps[-2:])}
        wide, narrow = steps[0][::-1], max((step[::-1] for step in steps[-2:]), key=guesses.__getitem__)
        runs = {end: _dry_run(config, plan, shape, end, phase) for end in {wide: 0, narrow: 0}} if exact else {}
        parts = estimate_of(config, plan, shape)
        peaks = {end: replace(plan, memory=parts, measured=run).peak_bytes or 0 for end, run in runs.items()} or guesses
        if max(peaks.values()) <= plan.budget:
            return Ladder(tuple(steps), max(peaks.values()), runs)
        unknown = max(unknown, *(peaks[end] - guesses[end] for end in peaks)) + 16 * MIB
    return None


def _by_formula(
    config: TrainConfig, plan: Plan, shape: ModelShape, most: int, room: int, phase: str
) -> list[tuple[int, int]]:
    """(tokens of the longest, how many examples), shorter ones first; the numbers of examples are a quarter apart."""
    steps: list[tuple[int, int]] = []
    examples = most

    def too_large(length: int) -> bool:
        if plan.offload and phase == "train":
            waiting = host_bytes(config, replace(plan, micro_batch=examples, seq_len=length), shape)
            if waiting > plan.gpu.ram_free_bytes * HOST_SHARE:
                return True
        return _formula_bytes(config, plan, shape, examples, length) > room

    while examples and (not steps or steps[-1][0] < plan.seq_len):
        longest = bisect_right(range(1, plan.seq_len + 1), False, key=too_large)
        if longest >= min(SHORTEST, plan.seq_len) and (not steps or longest > steps[-1][0]):
            steps.append((longest, examples))
        examples = min(examples - 1, max(1, examples * 4 // 5))
    return steps


def _formula_bytes(config: TrainConfig, plan: Plan, shape: ModelShape, examples: int, length: int) -> int:
    """What a micro-batch takes by the formula, with the gradients that the step's earlier ones have left."""
    gradients = 4 * shape.lora_parameters(config.r, config.target_modules) if plan.accumulation > 1 else 0
    return gradients + estimate_of(config, replace(plan, micro_batch=examples, seq_len=length), shape).total_bytes


def _dry_run(config: TrainConfig, plan: Plan, shape: ModelShape, size: Size, phase: str = "train") -> Peak:
    step = step_of(config, replace(plan, seq_len=size[1]), shape, phase, size[0])
    return measure_once(replace(step, accumulating=phase == "train" and plan.accumulation > 1))


# ------------------------------------------------------------------------------------------------ what it costs


def _costs(config: TrainConfig, plan: Plan, shape: ModelShape, runs: dict[Size, Peak]) -> tuple[float, float, float]:
    """Seconds per pass, per token and per pair of tokens: from the dry runs' counted work, or the formula's. A CPU counts in tokens."""
    kind, rate = plan.checkpointing, speed(plan.gpu)
    works = {size: flops_and_bytes(shape, *size, kind, config.quantization) for size in SAMPLES}
    if plan.gpu.kind != "cuda":
        usual = flops_and_bytes(shape, *SAMPLES[1], "off", config.quantization)
        longer = works[SAMPLES[1]][0] / usual[0]
        return longer * TOKENS_PER_PASS, longer, longer * TOKENS_PER_PAIR
    if runs:  # small micro-batches cost the same whether attention's output is kept or not
        small = replace(plan, checkpointing="off" if kind == "off" else "on")
        missing = [size for size in SAMPLES if size not in runs][: 3 - len(runs)]
        runs = runs | {size: _dry_run(config, small, shape, size) for size in missing}
        works = {size: (run.flops, run.bytes_moved) for size, run in runs.items()}
    points = [(n * length, n * length**2, rate.seconds(*work)) for (n, length), work in works.items()]
    per_pass, per_token, per_pair = _fitted(points)
    if plan.offload:  # there and back
        per_token += host_bytes(config, plan, shape) / plan.seq_len / HOST_BYTES_PER_SECOND
    return per_pass, per_token, per_pair


def _fitted(points: Iterable[tuple[int, int, float]]) -> tuple[float, float, float]:
    """The three costs that explain three micro-batches (tokens, pairs, seconds)."""
    (x, y, s), (x1, y1, s1), (x2, y2, s2) = sorted(points)
    determinant = (x1 - x) * (y2 - y) - (y1 - y) * (x2 - x)
    per_pair = ((x1 - x) * (s2 - s) - (s1 - s) * (x2 - x)) / determinant if determinant else 0.0
    per_token = (s2 - s - per_pair * (y2 - y)) / max(1, x2 - x)
    return max(0.0, s - per_token * x - per_pair * y), per_token, max(0.0, per_pair)

"""Checks for lesson 07: an effective batch shared among cards, which model needs sharding, and gradients put together again."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from helpers.config import TrainConfig
from helpers.hardware import GIB, KNOWN_GPUS, Gpu
from helpers.planner import DoesNotFit, make_plan
from helpers.registry import CATALOG

ENOUGH_RAM = 64 * GIB  # the question is about the cards
NUMBERS = 6  # in each gradient that `check_combined` hands over
TOKENS = ((5, 5), (9, 1), (3, 8, 40), (12, 0, 2), (0, 7))  # of each worker, in one trial after the other


def check_accumulation(answer: Any, effective_batch: int, micro_batch: int, gpus: int) -> None:
    """Easy. Is `answer` the accumulation that keeps the effective batch on so many GPUs?"""
    if answer is None:
        return print("Your turn: replace None by a number.")
    if isinstance(answer, bool) or not isinstance(answer, (int, float)) or not math.isfinite(answer):
        return print("Not yet: the answer is a number.")
    if answer * micro_batch * gpus == effective_batch:
        return print(
            "Right: three factors, one product. Another number of cards changes the accumulation, and not what is learned."
        )
    if answer * micro_batch == effective_batch:
        return print(
            "Not yet: that is right for one GPU. With all of them, a step would see "
            f"{answer * micro_batch * gpus:g} examples."
        )
    if answer * gpus == effective_batch:
        return print("Not yet: each GPU takes more than one example at a time; see micro_batch.")
    print(
        f"Not yet: with this accumulation, a step would see {answer * micro_batch * gpus:g} examples. How many should it see?"
    )


def fits(card: Gpu, model: str, max_length: int, **sharing: Any) -> bool:
    """Does the planner find settings for examples of this length, with every lever pulled? `sharing`: gpus and sharded."""
    least = TrainConfig(max_length=max_length, micro_batch_size=1, gradient_checkpointing="on")
    try:
        found = make_plan(least, replace(card, ram_free_bytes=ENOUGH_RAM), CATALOG[model], exact=False, **sharing)
    except DoesNotFit:
        return False
    return found.seq_len == max_length


def check_needs_sharding(answer: Any, models: Iterable[str], card: str, max_length: int) -> None:
    """Medium. Does `answer` name the models that do not fit one such card, and fit two that share the weights?"""
    if answer is None:
        return print("Your turn: replace None by a list of names.")
    models = list(models)
    try:
        named = {answer} if isinstance(answer, str) else set(answer)
    except TypeError:
        return print("Not yet: the answer is a list of names.")
    if strangers := sorted(str(name) for name in named if name not in models):
        return print(f"Not yet: the question is about {', '.join(models)}, and {strangers[0]!r:.60} is not among them.")
    for name in models:
        alone, together = (
            fits(KNOWN_GPUS[card], name, max_length, **sharing) for sharing in ({}, {"gpus": 2, "sharded": True})
        )
        if name in named and alone:
            return print(f"Not yet: {name} fits one {card}, with every lever pulled.")
        if name in named and not together:
            return print(
                f"Not yet: {name} fits no two {card}. Half of the weights is not half of the memory: what stays whole?"
            )
        if name not in named and together and not alone:
            return print(
                "Not yet: one is missing, or more. Ask the planner twice for each model: for one card, and for two that shard."
            )
    print("Right: below, one card is enough; above, even two are not. What sharding makes possible is a narrow strip.")


def check_combined(answer: Any) -> None:
    """Hard. Does `answer(gradients, tokens)` make the gradient of the whole step from what each worker hands in?

    `gradients` are those of each worker's mean loss over its own answer tokens, nan where it had none.
    """
    if answer is None:
        return print("Your turn: write the function, then hand it to the check.")
    if not callable(answer):
        return print("Not yet: the check needs the function itself, without brackets.")
    chance = torch.Generator().manual_seed(7)
    for tokens in TOKENS:
        sums = [
            torch.randn(NUMBERS, generator=chance) * count for count in tokens
        ]  # of each worker's losses; 0 / 0 is nan
        gradients = [part / count if count else torch.full_like(part, math.nan) for part, count in zip(sums, tokens)]
        handed = [part.clone() for part in gradients]
        try:  # what a learner writes may do anything
            given = torch.as_tensor(answer(handed, list(tokens)), dtype=torch.float32, device="cpu").detach()
        except Exception as error:
            said = str(error).partition("\n")[0]
            return print(
                f"Not yet: with {len(tokens)} workers, your function raises {type(error).__name__}: {said:.90}."
            )
        if len(handed) != len(gradients) or any(not _same(one, other) for one, other in zip(handed, gradients)):
            return print(
                "Not yet: your function changes the gradients that it was given. Put the result into a tensor of its own."
            )
        if given.shape != gradients[0].shape:
            return print(
                f"Not yet: each gradient has {NUMBERS} numbers, and your result has the shape {tuple(given.shape)}."
            )
        if not _same(given, torch.stack(sums).sum(0) / sum(tokens)):
            return print(f"Not yet: {_hint(given, gradients, tokens)}")
    print("Right, for two and three workers, and for idle ones. So it does not matter which worker a letter goes to.")


def _same(one: Any, other: torch.Tensor) -> bool:
    return (
        torch.is_tensor(one)
        and one.shape == other.shape
        and torch.allclose(one, other, rtol=1e-4, atol=1e-5, equal_nan=True)
    )


def _hint(given: torch.Tensor, gradients: Sequence[torch.Tensor], tokens: Sequence[int]) -> str:
    """What may have gone wrong, without saying how it is right."""
    if given.isnan().any():
        return "a worker without answer tokens hands in nan, and nan times anything is nan. How do you keep it out?"
    busy = [(part, count) for part, count in zip(gradients, tokens) if count]
    parts = torch.stack([part for part, _ in busy])
    weighted = torch.stack([part * count for part, count in busy]).sum(0)
    if any(_same(given, parts.sum(0) / workers) for workers in {len(busy), len(tokens)}):
        return "a token of a worker with few tokens counts for more than one of a worker with many."
    if _same(given, parts.sum(0)):
        return "that is the sum. The size of the gradient would grow with the number of workers."
    if any(_same(given, weighted / workers) for workers in {1, len(busy), len(tokens)}):
        return "the direction is right, its size is not: what would the single process have divided by?"
    return f"with {len(tokens)} workers it is another gradient than that of the mean over all answer tokens."

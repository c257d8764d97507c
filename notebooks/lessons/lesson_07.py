"""Lesson 07: the checks of its exercises, about batches, weights and gradients that several cards share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch

from helpers.config import TrainConfig
from helpers.hardware import GIB, KNOWN_GPUS, Gpu
from helpers.planner import DoesNotFit, make_plan
from helpers.registry import CATALOG
from notebooks.lessons.scaffold import NotYet, alike, attempt, exercise, must_be, number, tensor

ENOUGH_RAM = 64 * GIB  # the question is about the cards
NUMBERS = 6  # in each gradient that `check_combined` hands over
TOKENS = ((5, 5), (9, 1), (3, 8, 40), (12, 0, 2), (0, 7))  # of each worker, in one trial after the other


@exercise("a number", number)
def check_accumulation(answer: float, effective_batch: int, micro_batch: int, gpus: int) -> str:
    """Easy. Is `answer` the accumulation that keeps the effective batch on so many GPUs?"""
    seen = answer * micro_batch * gpus
    this = f"a step would see {seen:g} examples."
    slips = [
        (gpus * effective_batch, f"that is right for one GPU. With all of them, {this}"),
        (micro_batch * effective_batch, "each GPU takes more than one example at a time; see micro_batch."),
    ]
    must_be(seen, effective_batch, slips, f"with this accumulation, {this} How many should it see?", within=0)
    return (
        "Right: three factors, one product. Another number of cards changes the accumulation, and not what is learned."
    )


def fits(card: Gpu, model: str, max_length: int, **sharing: Any) -> bool:
    """Does the planner find settings for examples of this length, with every lever pulled? `sharing`: gpus and sharded."""
    least = TrainConfig(max_length=max_length, micro_batch_size=1, gradient_checkpointing="on")
    try:
        found = make_plan(least, replace(card, ram_free_bytes=ENOUGH_RAM), CATALOG[model], exact=False, **sharing)
    except DoesNotFit:
        return False
    return found.seq_len == max_length


@exercise("a list of names", lambda answer: {answer} if isinstance(answer, str) else set(answer))
def check_needs_sharding(named: set[Any], models: Iterable[str], card: str, max_length: int) -> str:
    """Medium. Does the answer name the models that do not fit one such card, and fit two that share the weights?"""
    models = list(models)
    if strangers := sorted(str(name) for name in named if name not in models):
        raise NotYet(f"the question is about {', '.join(models)}, and {strangers[0]!r:.60} is not among them.")
    for name in models:
        alone = fits(KNOWN_GPUS[card], name, max_length)
        together = fits(KNOWN_GPUS[card], name, max_length, gpus=2, sharded=True)
        if name in named and alone:
            raise NotYet(f"{name} fits one {card}, with every lever pulled.")
        if name in named and not together:
            raise NotYet(f"{name} fits no two {card}. Half of the weights is not half of the memory: what stays whole?")
        if name not in named and together and not alone:
            raise NotYet("one is missing, or more. Ask the planner for one card, and for two that shard.")
    return "Right: below, one card is enough; above, even two are not. What sharding makes possible is a narrow strip."


@exercise()
def check_combined(answer: Callable[[list[torch.Tensor], list[int]], Any]) -> str:
    """Hard. Does `answer(gradients, tokens)` make the gradient of the whole step from what each worker hands in?

    `gradients` are those of each worker's mean loss over its own answer tokens, nan where it had none.
    """
    chance = torch.Generator().manual_seed(7)
    for tokens in TOKENS:
        sums = torch.stack([torch.randn(NUMBERS, generator=chance) * count for count in tokens])  # of a worker's losses
        gradients = [part / count if count else torch.full_like(part, math.nan) for part, count in zip(sums, tokens)]
        handed = [part.clone() for part in gradients]
        given = attempt(answer, handed, list(tokens), kind=tensor, where=f"with {len(tokens)} workers, ")
        if len(handed) != len(gradients) or not all(map(alike, handed, gradients)):
            raise NotYet("your function changes the gradients that it was given. Use a tensor of its own.")
        if given.isnan().any():
            raise NotYet("a worker without answer tokens hands in nan, and nan times anything is nan.")
        total, busy = torch.stack(gradients).nan_to_num().sum(0), sum(count > 0 for count in tokens)
        few = "a token of a worker with few tokens counts for more than one of a worker with many."
        size = "the direction is right, its size is not: what would the single process have divided by?"
        slips = [
            (total / busy, few),
            (total / len(tokens), few),
            (total, "that is the sum. The size of the gradient would grow with the number of workers."),
            *((sums.sum(0) / count, size) for count in (1, busy, len(tokens))),
        ]
        otherwise = f"with {len(tokens)} workers it is another gradient than that of the mean over all answer tokens."
        must_be(given, sums.sum(0) / sum(tokens), slips, otherwise)
    return "Right, for two and three workers, and for idle ones. So it does not matter which worker a letter goes to."

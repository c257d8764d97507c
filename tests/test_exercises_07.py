"""The checks of lesson 07: right, wrong, missing and absurd answers."""

from functools import partial

import torch

from helpers.hardware import KNOWN_GPUS
from helpers.registry import CATALOG
from notebooks.lessons.lesson_07 import check_accumulation, check_combined, check_needs_sharding, fits
from tests.exercises import answers

MODELS = ("Qwen3-4B", "Llama-3.1-8B-Instruct", "Llama-2-13b-chat-hf", "Qwen3-14B")
CARD, LENGTH = "RTX 4060", 1024


def right(gradients, tokens):
    return sum(gradient * count for gradient, count in zip(gradients, tokens) if count) / sum(tokens)


def in_place(gradients, tokens):
    total = gradients[0]
    total *= tokens[0]
    return total


def stacked(gradients, tokens):
    shares = torch.tensor(tokens) / sum(tokens)
    return (torch.stack(gradients).nan_to_num() * shares[:, None]).sum(0)


def clears(gradients, tokens):
    result = right(gradients, tokens)
    gradients.clear()
    return result


def weighted(divisor):
    """The sum of all losses, where no worker is idle, divided by something."""
    return lambda gradients, tokens: sum(g * t for g, t in zip(gradients, tokens)) / divisor(tokens)


@answers(
    {
        partial(check_accumulation, effective_batch=32, micro_batch=2, gpus=4): [
            (4, "Right: three factors"),
            (4.0, "Right"),
            (16, "one GPU"),
            (2, "16 examples"),
            (8, "at a time"),
            (1, "8 examples"),
            (0, "0 examples"),
            (-4, "-32 examples"),
            ([4], "the answer is a number"),
        ],
        partial(check_needs_sharding, models=MODELS, card=CARD, max_length=LENGTH): [
            (["Llama-2-13b-chat-hf"], "Right"),
            ("Llama-2-13b-chat-hf", "Right"),
            ({"Llama-2-13b-chat-hf"}, "Right"),
            (["Llama-2-13b-chat-hf", "Llama-2-13b-chat-hf"], "Right"),
            ([], "missing"),
            (["Qwen3-4B", "Llama-2-13b-chat-hf"], "Qwen3-4B fits one"),
            (["Llama-2-13b-chat-hf", "Qwen3-14B"], "stays whole"),
            (list(MODELS), "fits one"),
            (["Llama-2-13b"], "is not among them"),
            (7, "list of names"),
            ([7, None], "is not among them"),
            ([["Qwen3-4B"]], "list of names"),
            ("", "is not among them"),
        ],
        check_combined: [
            (right, "Right"),
            (stacked, "Right"),
            (lambda gradients, tokens: right(gradients, tokens).tolist(), "Right"),
            (lambda gradients, tokens: sum(gradients) / len(gradients), "few tokens"),
            (lambda gradients, tokens: sum(gradients), "sum"),
            (weighted(lambda tokens: 1), "size is not"),
            (weighted(len), "size is not"),
            (weighted(sum), "nan"),
            (lambda gradients, tokens: right(gradients, tokens) * 7, "another gradient"),
            (lambda gradients, tokens: gradients[0], "another gradient"),
            (lambda gradients, tokens: torch.cat(gradients), "shape"),
            (lambda gradients, tokens: 7, "shape"),
            (lambda gradients, tokens: None, "returns None"),
            (lambda gradients, tokens: gradients.clear(), "returns None"),
            (lambda gradients, tokens: "text", "returns 'text'"),
            (lambda gradients: gradients, "TypeError"),
            (clears, "changes the gradients"),
            (in_place, "changes the gradients"),
        ],
    }
)
def test_answers(said, check, answer, words):
    said(check, answer, words)


def test_the_question_has_one_of_each_kind():
    """One that fits a single card, one that fits two that shard, and one that fits neither; no copy of all weights helps."""
    kinds = {
        name: (fits(KNOWN_GPUS[CARD], name, LENGTH), fits(KNOWN_GPUS[CARD], name, LENGTH, gpus=2, sharded=True))
        for name in MODELS
    }
    assert set(kinds.values()) == {(True, True), (False, True), (False, False)}
    assert not fits(KNOWN_GPUS[CARD], "Llama-2-13b-chat-hf", LENGTH, gpus=2)


def test_what_the_lesson_says_of_the_menu():
    """Everything fits one T4 with the levers pulled, in the menu's default length."""
    assert [name for name in CATALOG if not fits(KNOWN_GPUS["T4"], name, 512)] == []

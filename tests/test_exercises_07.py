"""The checks of lesson 07: right, wrong, missing and absurd answers."""

import math

import pytest
import torch

from helpers.hardware import KNOWN_GPUS
from helpers.registry import CATALOG
from notebooks.lessons.lesson_07 import check_accumulation, check_combined, check_needs_sharding, fits

MODELS = ("Qwen3-4B", "Llama-3.1-8B-Instruct", "Llama-2-13b-chat-hf", "Qwen3-14B")
CARD, LENGTH = "RTX 4060", 1024


@pytest.mark.parametrize(
    ("answer", "beginning", "holds"),
    [
        (4, "Right", "factors"),
        (4.0, "Right", ""),
        (16, "Not yet", "one GPU"),
        (2, "Not yet", "16 examples"),
        (8, "Not yet", "at a time"),
        (1, "Not yet", "8 examples"),
        (0, "Not yet", "0 examples"),
        (-4, "Not yet", ""),
        (None, "Your turn", ""),
        ("4", "Not yet", "number"),
        (True, "Not yet", "number"),
        (math.nan, "Not yet", "number"),
        (math.inf, "Not yet", "number"),
        ([4], "Not yet", "number"),
    ],
)
def test_accumulation(answer, beginning, holds, said):
    line = said(check_accumulation, answer, effective_batch=32, micro_batch=2, gpus=4)
    assert line.startswith(beginning) and holds in line


@pytest.mark.parametrize(
    ("answer", "beginning", "holds"),
    [
        (["Llama-2-13b-chat-hf"], "Right", "strip"),
        ("Llama-2-13b-chat-hf", "Right", ""),
        ({"Llama-2-13b-chat-hf"}, "Right", ""),
        (["Llama-2-13b-chat-hf", "Llama-2-13b-chat-hf"], "Right", ""),
        ([], "Not yet", "missing"),
        (["Qwen3-4B", "Llama-2-13b-chat-hf"], "Not yet", "Qwen3-4B fits one"),
        (["Llama-2-13b-chat-hf", "Qwen3-14B"], "Not yet", "stays whole"),
        (list(MODELS), "Not yet", "fits one"),
        (["Llama-2-13b"], "Not yet", "is not among them"),
        (None, "Your turn", ""),
        (7, "Not yet", "list of names"),
        ([7, None], "Not yet", "is not among them"),
        ([["Qwen3-4B"]], "Not yet", "list of names"),
        ("", "Not yet", "is not among them"),
    ],
)
def test_needs_sharding(answer, beginning, holds, said):
    line = said(check_needs_sharding, answer, MODELS, CARD, LENGTH)
    assert line.startswith(beginning) and holds in line


def test_the_question_has_one_of_each_kind():
    """One that fits a single card, one that fits two that shard, and one that fits neither; no copy of all weights helps."""
    kinds = {
        name: (fits(KNOWN_GPUS[CARD], name, LENGTH), fits(KNOWN_GPUS[CARD], name, LENGTH, gpus=2, sharded=True))
        for name in MODELS
    }
    assert set(kinds.values()) == {(True, True), (False, True), (False, False)}
    assert not fits(KNOWN_GPUS[CARD], "Llama-2-13b-chat-hf", LENGTH, gpus=2)


def right(gradients, tokens):
    return sum(gradient * count for gradient, count in zip(gradients, tokens) if count) / sum(tokens)


def in_place(gradients, tokens):
    total = gradients[0]
    total *= tokens[0]
    return total


def stacked(gradients, tokens):
    shares = torch.tensor(tokens) / sum(tokens)
    return (torch.stack(gradients).nan_to_num() * shares[:, None]).sum(0)


@pytest.mark.parametrize(
    ("answer", "beginning", "holds"),
    [
        (right, "Right", ""),
        (stacked, "Right", ""),
        (lambda gradients, tokens: right(gradients, tokens).tolist(), "Right", ""),
        (lambda gradients, tokens: sum(gradients) / len(gradients), "Not yet", "few tokens"),
        (lambda gradients, tokens: sum(gradients), "Not yet", "sum"),
        (lambda gradients, tokens: sum(g * t for g, t in zip(gradients, tokens)), "Not yet", "size is not"),
        (
            lambda gradients, tokens: sum(g * t for g, t in zip(gradients, tokens)) / len(tokens),
            "Not yet",
            "size is not",
        ),
        (lambda gradients, tokens: sum(g * t for g, t in zip(gradients, tokens)) / sum(tokens), "Not yet", "nan"),
        (lambda gradients, tokens: right(gradients, tokens) * 7, "Not yet", "another gradient"),
        (lambda gradients, tokens: gradients[0], "Not yet", "another gradient"),
        (lambda gradients, tokens: torch.cat(gradients), "Not yet", "shape"),
        (lambda gradients, tokens: 7, "Not yet", "shape"),
        (lambda gradients, tokens: None, "Not yet", "raises"),
        (lambda gradients, tokens: "text", "Not yet", "raises"),
        (lambda gradients, tokens: gradients.clear(), "Not yet", "raises"),
        (lambda gradients, tokens: 1 / 0, "Not yet", "ZeroDivisionError"),
        (lambda gradients: gradients, "Not yet", "TypeError"),
        (in_place, "Not yet", "changes the gradients"),
        (None, "Your turn", ""),
        (12, "Not yet", "function itself"),
    ],
)
def test_combined(answer, beginning, holds, said):
    line = said(check_combined, answer)
    assert line.startswith(beginning) and holds in line


def test_gradients_that_were_thrown_away_are_noticed(said):
    def clears(gradients, tokens):
        result = right(gradients, tokens)
        gradients.clear()
        return result

    assert "changes the gradients" in said(check_combined, clears)


def test_what_the_lesson_says_of_the_menu():
    """Everything fits one T4 with the levers pulled, in the menu's default length."""
    assert [name for name in CATALOG if not fits(KNOWN_GPUS["T4"], name, 512)] == []

"""The checks of lesson 02 tell right from wrong, say what to look at, and never raise."""

import pytest
import torch

from helpers.registry import CATALOG
from notebooks.lessons.lesson_02 import check_best_pair, check_lora_layer, check_trainable

SHAPE = CATALOG["Llama-3.1-8B-Instruct"].shape
QV = ["q_proj", "v_proj"]
LAYERS = SHAPE.num_hidden_layers
CHECKS = [check_trainable, check_lora_layer, check_best_pair]


def in_place(x, weight, a, b, alpha, rank):
    weight += alpha / rank * b @ a
    return x @ weight.T


def best_pair(change, rank):
    u, sizes, v = torch.linalg.svd(change, full_matrices=False)
    return u[:, :rank] * sizes[:rank], v[:rank]


@pytest.mark.parametrize("check", CHECKS)
def test_a_missing_answer_is_the_readers_turn(said, check):
    assert said(check, None).startswith("Your turn")


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize(
    "answer", ["5", float("nan"), -1, [], {}, True, object(), lambda: 0, lambda *_: "x", lambda *_: 1 / 0]
)
def test_an_absurd_answer_is_not_right_and_does_not_raise(said, check, answer):
    assert said(check, answer).startswith("Not yet")


def test_the_trainable_parameters(said):
    assert said(check_trainable, SHAPE.lora_parameters(8, QV)).startswith("Right")


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (SHAPE.lora_parameters(8, QV) // LAYERS, "one transformer layer"),
        (SHAPE.lora_parameters(8), "all linear"),
        (SHAPE.lora_parameters(1, QV), "rank 1"),
        (LAYERS * 8 * 2 * SHAPE.hidden_size, "A alone"),
        (LAYERS * 8 * (SHAPE.query_size + SHAPE.key_value_size), "B alone"),
        (LAYERS * 8 * 4 * SHAPE.hidden_size, "not square"),
        (LAYERS * SHAPE.hidden_size * (SHAPE.query_size + SHAPE.key_value_size), "layers themselves"),
        (12345, "for each chosen layer"),
    ],
)
def test_a_wrong_count_gets_the_hint_that_fits(said, answer, hint):
    line = said(check_trainable, answer)
    assert line.startswith("Not yet") and hint in line


@pytest.mark.parametrize(
    "answer",
    [
        lambda x, w, a, b, alpha, rank: x @ w.T + alpha / rank * (x @ a.T @ b.T),
        lambda x, w, a, b, alpha, rank: x @ (w + alpha / rank * b @ a).T,
    ],
)
def test_a_lora_layer_however_it_is_written(said, answer):
    assert said(check_lora_layer, answer).startswith("Right")


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda x, w, a, b, alpha, rank: x @ w.T, "frozen layer alone"),
        (lambda x, w, a, b, alpha, rank: alpha / rank * x @ a.T @ b.T, "adapter alone"),
        (lambda x, w, a, b, alpha, rank: x @ w.T + x @ a.T @ b.T, "scale is missing"),
        (lambda x, w, a, b, alpha, rank: x @ w.T + alpha * (x @ a.T @ b.T), "divided"),
        (lambda x, w, a, b, alpha, rank: alpha / rank * x @ (w + b @ a).T, "adapter only"),
        (lambda x, w, a, b, alpha, rank: x @ w.T - x @ a.T @ b.T, "values are not"),
        (lambda x, w, a, b, alpha, rank: (x @ w.T)[0], "shape"),
        (lambda x, w, a, b, alpha, rank: x @ w + x @ a @ b, "raises"),
        (in_place, "frozen"),
    ],
)
def test_a_wrong_layer_gets_the_hint_that_fits(said, answer, hint):
    line = said(check_lora_layer, answer)
    assert line.startswith("Not yet") and hint in line


def test_the_best_pair(said):
    assert said(check_best_pair, best_pair).startswith("Right")


def lopsided(change, rank):
    u, _, v = torch.linalg.svd(change, full_matrices=False)
    return u[:, :rank], v[:rank]


def smallest(change, rank):
    u, sizes, v = torch.linalg.svd(change, full_matrices=False)
    return u[:, -rank:] * sizes[-rank:], v[-rank:]


def twice(change, rank):
    b, a = best_pair(change, rank)
    return b, a * torch.linalg.svdvals(change)[:rank, None]


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lopsided, "are missing"),
        (smallest, "Keep the largest"),
        (twice, "belong to one"),
        (lambda change, rank: (change[:, :rank], torch.eye(rank, change.shape[1])), "largest first"),
        (lambda change, rank: best_pair(change, rank)[::-1], "yours are"),
        (lambda change, rank: best_pair(change, rank + 1), "yours are"),
        (lambda change, rank: (change[:, :rank] * float("nan"), change[:rank]), "Not yet"),
    ],
)
def test_a_worse_pair_gets_the_hint_that_fits(said, answer, hint):
    line = said(check_best_pair, answer)
    assert line.startswith("Not yet") and hint in line

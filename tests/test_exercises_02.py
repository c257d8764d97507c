"""The checks of lesson 02 tell right from wrong, say what to look at, and never raise."""

import torch

from helpers.registry import CATALOG
from notebooks.lessons.lesson_02 import check_best_pair, check_lora_layer, check_trainable
from tests.exercises import answers

SHAPE = CATALOG["Llama-3.1-8B-Instruct"].shape
QV = ["q_proj", "v_proj"]
LAYERS, SIDE = SHAPE.num_hidden_layers, SHAPE.hidden_size
OUTPUTS = SHAPE.query_size + SHAPE.key_value_size


def in_place(x, weight, a, b, alpha, rank):
    weight += alpha / rank * b @ a
    return x @ weight.T


def best_pair(change, rank, power=1, first=0):
    u, sizes, v = torch.linalg.svd(change, full_matrices=False)
    kept = range(len(sizes))[first:][:rank]
    return u[:, kept] * sizes[kept] ** power, v[kept]


@answers(
    {
        check_trainable: [
            (SHAPE.lora_parameters(8, QV), "Right"),
            (SHAPE.lora_parameters(8, QV) + 1, "each chosen layer"),
            (SHAPE.lora_parameters(8, QV) // LAYERS, "one transformer layer"),
            (SHAPE.lora_parameters(8), "all linear"),
            (SHAPE.lora_parameters(1, QV), "rank 1"),
            (LAYERS * 8 * 2 * SIDE, "A alone"),
            (LAYERS * 8 * OUTPUTS, "B alone"),
            (LAYERS * 8 * 4 * SIDE, "not square"),
            (LAYERS * SIDE * OUTPUTS, "layers themselves"),
        ],
        check_lora_layer: [
            (lambda x, w, a, b, alpha, rank: x @ w.T + alpha / rank * (x @ a.T @ b.T), "Right"),
            (lambda x, w, a, b, alpha, rank: x @ (w + alpha / rank * b @ a).T, "Right, for three shapes. From left"),
            (lambda x, w, a, b, alpha, rank: x @ w.T, "frozen layer alone"),
            (lambda x, w, a, b, alpha, rank: alpha / rank * x @ a.T @ b.T, "adapter alone"),
            (lambda x, w, a, b, alpha, rank: x @ w.T + x @ a.T @ b.T, "scale is missing"),
            (lambda x, w, a, b, alpha, rank: x @ w.T + alpha * (x @ a.T @ b.T), "divided"),
            (lambda x, w, a, b, alpha, rank: x @ w.T + alpha // rank * (x @ a.T @ b.T), "a whole number"),
            (lambda x, w, a, b, alpha, rank: alpha / rank * x @ (w + b @ a).T, "adapter only"),
            (lambda x, w, a, b, alpha, rank: x @ w.T - x @ a.T @ b.T, "values are not"),
            (lambda x, w, a, b, alpha, rank: (x @ w.T)[0], "shape"),
            (lambda x, w, a, b, alpha, rank: x @ w + x @ a @ b, "raises"),
            (in_place, "frozen"),
        ],
        check_best_pair: [
            (best_pair, "Right"),
            (lambda change, rank: [part.tolist() for part in best_pair(change, rank)], "Right"),
            (lambda change, rank: best_pair(change, rank, power=0), "are missing"),
            (lambda change, rank: best_pair(change, rank, power=2), "are in it twice"),
            (lambda change, rank: best_pair(change, rank, first=-rank), "Keep the largest"),
            (lambda change, rank: (change[:, :rank], torch.eye(rank, change.shape[1])), "largest first"),
            (lambda change, rank: best_pair(change, rank)[::-1], "yours are"),
            (lambda change, rank: best_pair(change, rank + 1), "yours are"),
            (lambda change, rank: (change[:, :rank] * float("nan"), change[:rank]), "misses nan"),
        ],
    }
)
def test_answers(said, check, answer, words):
    said(check, answer, words)

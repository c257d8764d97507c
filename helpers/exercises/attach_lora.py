"""Checks for lesson 02: trainable parameters of a larger model, a LoRA layer by hand, and the best pair of a given rank."""

from __future__ import annotations

from typing import Any

import torch

from helpers.catalog import CATALOG

SHAPES = [(6, 4, 2, 8), (3, 7, 1, 1), (5, 5, 3, 6)]  # (outputs, inputs, rank, alpha)
NEAR = 1e-4
AS_GOOD_AS = 1.001  # times the smallest error that is possible


def check_trainable(
    answer: Any, model: str = "Llama-3.1-8B-Instruct", r: int = 8, layers: tuple[str, ...] = ("q_proj", "v_proj")
) -> None:
    """Is `answer` the number of trainable parameters of a LoRA adapter with rank `r` on these layers of a model of the menu?"""
    if answer is None:
        return print("Your turn: replace None by a number of parameters.")
    if isinstance(answer, bool) or not isinstance(answer, (int, float)) or answer != answer:
        return print("Not yet: the answer is a whole number.")
    shape = CATALOG[model].shape
    wanted = shape.lora_parameters(r, list(layers))
    if answer == wanted:
        return print(
            f"Right. That is {wanted / shape.parameters():.3%} of the model: two thin matrices for each chosen layer, and no other."
        )
    sizes = [shape.linear_layers()[layer] for layer in layers]
    slips = {
        wanted // shape.num_hidden_layers: "that is one transformer layer. How many does the model have?",
        shape.lora_parameters(r): "that is for all linear layers; only two of them are asked for here.",
        shape.num_hidden_layers
        * sum(i * o for i, o in sizes): "that is the size of the layers themselves. Which matrices learn?",
        shape.num_hidden_layers * r * sum(i for i, _ in sizes): "A alone, without B.",
        shape.num_hidden_layers * r * sum(o for _, o in sizes): "B alone, without A.",
        shape.num_hidden_layers * r * sum(2 * i for i, _ in sizes): "v_proj is not square: look at its (in, out).",
        shape.lora_parameters(1, list(layers)): "that would be rank 1.",
    }
    print(
        f"Not yet: {slips.get(answer, 'A has r x in numbers and B has out x r, for each chosen layer of each transformer layer.')}"
    )


def check_lora_layer(answer: Any) -> None:
    """Does `answer(x, weight, a, b, alpha, rank)` give what a LoRA layer gives?"""
    if answer is None:
        return print("Your turn: write the function, then hand it to the check.")
    if not callable(answer):
        return print("Not yet: the check needs the function itself, without brackets.")
    chance = torch.Generator().manual_seed(0)
    for outputs, inputs, rank, alpha in SHAPES:
        shapes = [(2, 3, inputs), (outputs, inputs), (rank, inputs), (outputs, rank)]
        x, weight, a, b = (torch.randn(shape, generator=chance) for shape in shapes)
        before = weight.clone()
        try:
            given = torch.as_tensor(answer(x, weight, a, b, alpha, rank), dtype=torch.float32, device="cpu")
        except Exception as error:
            said = str(error).splitlines()[0] if str(error) else "no message"
            return print(
                f"Not yet: with W {outputs} x {inputs} and rank {rank}, your function raises {type(error).__name__}: {said}"
            )
        plain, learned = x @ before.T, x @ a.T @ b.T
        wanted = plain + alpha / rank * learned
        if not torch.equal(weight, before):
            return print("Not yet: your function changes W. It is frozen: add to the layer's output instead.")
        if given.shape != wanted.shape:
            return print(
                f"Not yet: x has shape {tuple(x.shape)} and W {outputs} x {inputs}, so the output has shape {tuple(wanted.shape)}; "
                f"yours has {tuple(given.shape)}."
            )
        if not torch.allclose(given, wanted, atol=NEAR):
            return print(f"Not yet: {_layer_hint(given, plain, learned, alpha, rank)}")
    print(
        "Right, for three shapes. The pair never becomes a large matrix here: x goes through A, which makes it short, and then through B."
    )


def _layer_hint(given: torch.Tensor, plain: torch.Tensor, learned: torch.Tensor, alpha: float, rank: int) -> str:
    if torch.allclose(given, plain, atol=NEAR):
        return "that is the frozen layer alone."
    if torch.allclose(given, alpha / rank * learned, atol=NEAR):
        return "that is the adapter alone; the frozen layer's output belongs to it."
    if torch.allclose(given, plain + learned, atol=NEAR):
        return "the scale is missing."
    if torch.allclose(given, plain + alpha * learned, atol=NEAR):
        return "alpha is divided by something first."
    if torch.allclose(given, alpha / rank * (plain + learned), atol=NEAR):
        return "the scale is for the adapter only, not for W."
    return "the shape is right, the values are not. The output is x Wᵀ + (alpha / r) x Aᵀ Bᵀ."


def check_best_pair(answer: Any, rank: int = 3) -> None:
    """Does `answer(change, rank)` give (b, a) of that rank whose product is as near to `change` as any can be?"""
    if answer is None:
        return print("Your turn: write the function, then hand it to the check.")
    if not callable(answer):
        return print("Not yet: the check needs the function itself, without brackets.")
    chance = torch.Generator().manual_seed(0)
    for outputs, inputs in [(12, 8), (6, 15)]:
        change = torch.randn((outputs, inputs), generator=chance)
        try:
            b, a = (
                torch.as_tensor(matrix, dtype=torch.float32, device="cpu") for matrix in answer(change.clone(), rank)
            )
        except Exception as error:
            said = str(error).splitlines()[0] if str(error) else "no message"
            return print(
                f"Not yet: with a change of {outputs} x {inputs}, your function raises {type(error).__name__}: {said}"
            )
        if b.shape != (outputs, rank) or a.shape != (rank, inputs):
            return print(
                f"Not yet: for a change of {outputs} x {inputs} and rank {rank}, B is {outputs} x {rank} and A is {rank} x {inputs}; "
                f"yours are {tuple(b.shape)} and {tuple(a.shape)}."
            )
        smallest = torch.linalg.svdvals(change)[rank:].norm()
        error = (change - b @ a).norm()
        if not error <= AS_GOOD_AS * smallest:
            return print(
                f"Not yet: your product misses {error / change.norm():.0%} of the change, and {smallest / change.norm():.0%} is possible. "
                f"{_pair_hint(change, rank, b, a)}"
            )
    print(
        "Right: no pair of this rank is nearer. Training finds its pair by small steps instead, without ever seeing the change it looks for."
    )


def _pair_hint(change: torch.Tensor, rank: int, b: torch.Tensor, a: torch.Tensor) -> str:
    u, sizes, v = torch.linalg.svd(change, full_matrices=False)
    product, kept = b @ a, slice(None, rank)
    if torch.allclose(product, u[:, kept] @ v[kept], atol=NEAR):
        return "The singular values are missing."
    if torch.allclose(product, (u[:, kept] * sizes[kept] ** 2) @ v[kept], atol=NEAR):
        return "The singular values belong to one of the two matrices, or their roots to both."
    if torch.allclose(product, (u[:, -rank:] * sizes[-rank:]) @ v[-rank:], atol=NEAR):
        return "Those are the smallest parts. Keep the largest."
    return "torch.linalg.svd writes a matrix as a sum of rank-1 parts, largest first."

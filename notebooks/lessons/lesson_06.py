"""Lesson 06: what folders hold, 16-bit models for a moment, and the checks of the exercises.

folder_table(run.adapter)                               # file by file, with megabytes
with plain_model(merged, plan) as model: ...            # 16-bit weights on this machine's device, gone afterwards
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from jinja2.exceptions import TemplateError
from safetensors import safe_open

from helpers.models import free_memory
from notebooks.lessons.scaffold import NotYet, attempt, exercise, first_difference, function, number

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from helpers.plan import Plan


MB = 1e6  # as file managers and hubs count


def size_of(place: str | Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    place = Path(place)
    return sum(file.stat().st_size for file in ([place] if place.is_file() else place.rglob("*")) if file.is_file())


def folder_table(place: str | Path) -> pd.DataFrame:
    """The files of a folder with their sizes in MB, largest first."""
    files = sorted((file for file in Path(place).rglob("*") if file.is_file()), key=size_of, reverse=True)
    rows = [{"file": file.relative_to(place).as_posix(), "MB": round(size_of(file) / MB, 3)} for file in files]
    return pd.DataFrame(rows, columns=["file", "MB"]).set_index("file")


def size_table(places: Mapping[str, str | Path]) -> pd.DataFrame:
    """label -> file or folder, as a table of MB and of how many times the first one each is."""
    sizes = {label: size_of(place) for label, place in places.items()}
    first = next(iter(sizes.values()))
    rows = [
        {"what": label, "MB": round(size / MB, 1), "times the first": round(size / first, 1)}
        for label, size in sizes.items()
    ]
    return pd.DataFrame(rows).set_index("what")


@contextmanager
def plain_model(folder: str | Path, plan: Plan) -> Iterator[PreTrainedModel]:
    """The model in `folder` without quantization, for evaluation; its memory comes back when the block ends.

    Its numbers are those that the plan calculates in: fp32 on a CPU, 16 bit on a card.
    """
    from transformers import AutoModelForCausalLM

    device = 0 if plan.gpu.kind == "cuda" else plan.gpu.kind
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, plan.dtype), device_map={"": device})
    try:
        yield model.eval()
    finally:
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.data = torch.empty(0, dtype=tensor.dtype)  # even if a variable still names it
        free_memory()


# ------------------------------------------------------------------------------------------- checks of the exercises

NEAR = 0.02  # of the right size
SHAPES = [(6, 6, 2, 4), (5, 8, 3, 16), (7, 4, 1, 1)]  # (outputs, inputs, rank, alpha)
CONVERSATIONS = [
    [{"role": "system", "content": "You answer briefly."}, {"role": "user", "content": "Where is my kettle?"}],
    [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hello Bao,"},
        {"role": "user", "content": "Is the pan\nin stock? "},
    ],
]


@exercise("a number, in megabytes", number)
def check_adapter_size(answer: float, adapter: str | Path, rank: int) -> str:
    """Is `answer` the megabytes (10^6 bytes) of this adapter's weights, had they been trained with another rank?"""
    now, wanted, half = _sizes(Path(adapter), rank)

    def is_near(size: float) -> bool:
        return abs(answer - size) <= NEAR * size

    if is_near(wanted):
        return "Right. Both matrices of each pair have one side as long as the rank, so the size goes with it, exactly in proportion."
    raise NotYet.because(
        (is_near(now), "that is the size at the rank it was trained with."),
        (is_near(wanted * MB), "that is in bytes; wanted are megabytes of a million bytes."),
        (is_near(half), "that would be 16-bit numbers. The cell of section 2 prints the precision of the adapter."),
        (
            is_near(wanted**2 / now),
            "the rank is a side of each matrix once, not twice: A has r rows, B has r columns.",
        ),
        otherwise="Look at the shapes: which side of A and which side of B is the rank? How do the bytes follow?",
    )


def _sizes(adapter: Path, rank: int) -> tuple[float, float, float]:
    """MB of the LoRA tensors as they are, at another rank, and at that rank in 16 bit."""
    now = wanted = half = 0.0
    with safe_open(adapter / "adapter_model.safetensors", "pt") as weights:
        for name in weights.keys():  # noqa: SIM118
            shape, width = weights.get_slice(name).get_shape(), weights.get_tensor(name).element_size()
            other = shape[1] if ".lora_A." in name else shape[0]  # A is rank x inputs, B is outputs x rank
            now += shape[0] * shape[1] * width / MB
            wanted += rank * other * width / MB
            half += rank * other * 2 / MB
    return now, wanted, half


@exercise("the function itself, without brackets", function)
def check_merge(answer: Callable[..., Any]) -> str:
    """Does `answer(weight, a, b, alpha, rank)` give the merged weight?"""
    chance = torch.Generator().manual_seed(0)
    for outputs, inputs, rank, alpha in SHAPES:
        shapes = [(outputs, inputs), (rank, inputs), (outputs, rank)]
        weight, a, b = (torch.randn(shape, generator=chance) for shape in shapes)
        before, case = weight.clone(), (weight, a, b, alpha, rank)
        merged = attempt(
            lambda case=case: torch.as_tensor(answer(*case), dtype=torch.float32, device="cpu"),
            f"with W {outputs} x {inputs} and rank {rank}, ",
        )
        if not torch.equal(weight, before):
            raise NotYet("your function changes the W that it was given: += writes into the model. Return a new one.")
        if merged.shape != before.shape:
            shape = " x ".join(map(str, merged.shape)) or "one number"
            raise NotYet(f"W is {outputs} x {inputs}, and your result is {shape}.")
        if not torch.allclose(merged, before + alpha / rank * b @ a, atol=1e-4):
            raise _merge_hint(merged - before, before, b @ a, alpha, rank)
    return "Right, for three shapes. That is all a merge is: afterwards, the layer costs what it cost before, and the adapter is gone."


def _merge_hint(change: torch.Tensor, weight: torch.Tensor, product: torch.Tensor, alpha: int, rank: int) -> NotYet:
    def is_near(wanted: torch.Tensor) -> bool:
        return torch.allclose(change, wanted, atol=1e-4)

    scaled = any(is_near(factor * product) for factor in (1.0, alpha, 1 / rank, rank / alpha))
    return NotYet.because(
        (is_near(0 * product), "the result is W itself. Add what A and B have learned."),
        (is_near(alpha / rank * product - weight), "that is the change alone. Add it to W."),
        (scaled, "B times A is there, the factor before it is not yet right: lora_alpha / r."),
        otherwise="the product is not B times A, in this order.",
    )


@exercise("the function itself, without brackets", function)
def check_prompt(answer: Callable[[list[dict[str, str]]], Any], tokenizer: PreTrainedTokenizerBase) -> str:
    """Does `answer(messages)` write what the tokenizer's chat template writes, ready for the model's answer?"""
    for conversation in CONVERSATIONS:
        messages, wanted = _rendered(conversation, tokenizer)
        given = attempt(lambda messages=messages: answer([dict(message) for message in messages]))
        if not isinstance(given, str):
            raise NotYet(f"the result must be a text, and yours is of the type {type(given).__name__}.")
        if given != wanted:
            same = first_difference(given, wanted)
            ends = "then look at what the template puts there, spaces and line breaks too"
            if same == len(given) or same == len(wanted):
                ends = "and there yours ends" if same == len(given) else "and yours goes on after that"
            there = given[max(0, same - 12) : same]
            raise NotYet(f"the first {same} of {len(wanted)} characters are right, up to ...{there!r}; {ends}.")
    return "Right, to the last line break. This is what a Modelfile must say; one character off, and the model reads what it never saw."


def _rendered(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> tuple[list[dict[str, str]], str]:
    """The conversation and what the template writes for it; without its system message where the template knows none."""
    try:
        return messages, tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except TemplateError:  # as in Gemma
        return messages[1:], tokenizer.apply_chat_template(messages[1:], tokenize=False, add_generation_prompt=True)

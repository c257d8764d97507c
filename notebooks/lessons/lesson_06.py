"""What lesson 06 needs to look at folders and at 16-bit models.

folder_table({"adapter": run.adapter})                  # file by file, with bytes
with plain_model(merged, plan) as model: ...            # 16-bit weights on this machine's device, gone afterwards

Checks for lesson 06: the size of an adapter, a merge by hand, and the text that a model really reads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from jinja2.exceptions import TemplateError
from safetensors import safe_open

from helpers.models import free_memory

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
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, plan.dtype), device_map={"": device}
    ).eval()
    try:
        yield model
    finally:
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.data = torch.empty(0, dtype=tensor.dtype)  # even if a variable still names it
        free_memory()


NEAR = 0.02  # of the right size
CONVERSATIONS = [
    [{"role": "system", "content": "You answer briefly."}, {"role": "user", "content": "Where is my kettle?"}],
    [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hello Bao,"},
        {"role": "user", "content": "Is the pan\nin stock? "},
    ],
]


def check_adapter_size(answer: Any, adapter: str | Path, rank: int) -> None:
    """Is `answer` the megabytes (10^6 bytes) of this adapter's weights, had they been trained with another rank?"""
    if answer is None:
        return print("Your turn: replace None by a number of megabytes.")
    if isinstance(answer, bool) or not isinstance(answer, (int, float)) or not math.isfinite(answer):
        return print("Not yet: the answer is a number, in megabytes.")
    now, wanted, half = _sizes(Path(adapter), rank)
    if abs(answer - wanted) <= NEAR * wanted:
        return print(
            "Right. Both matrices of each pair have one side as long as the rank, so the size goes with it, exactly in proportion."
        )
    hint = "Look at the shapes: which side of A and which side of B is the rank? How do the bytes follow?"
    if abs(answer - now) <= NEAR * now:
        hint = "that is the size at the rank it was trained with."
    elif abs(answer - wanted * 1e6) <= NEAR * wanted * 1e6:
        hint = "that is in bytes; wanted are megabytes of a million bytes."
    elif abs(answer - half) <= NEAR * half:
        hint = "that would be 16-bit numbers. The adapter is kept in the precision that the cell of section 2 prints."
    elif abs(answer - wanted * wanted / now) <= NEAR * wanted * wanted / now:
        hint = "the rank is a side of each matrix once, not twice: A has r rows, B has r columns."
    print(f"Not yet: {hint}")


def check_merge(answer: Any) -> None:
    """Does `answer(weight, a, b, alpha, rank)` give the merged weight?"""
    if answer is None:
        return print("Your turn: write the function, then hand it to the check.")
    if not callable(answer):
        return print("Not yet: the check needs the function itself, without brackets.")
    chance = torch.Generator().manual_seed(0)
    for outputs, inputs, rank, alpha in [(6, 6, 2, 4), (5, 8, 3, 16), (7, 4, 1, 1)]:
        weight, a, b = (
            torch.randn(shape, generator=chance) for shape in [(outputs, inputs), (rank, inputs), (outputs, rank)]
        )
        before = weight.clone()
        try:
            merged = torch.as_tensor(answer(weight, a, b, alpha, rank), dtype=torch.float32, device="cpu")
        except Exception as error:
            return print(
                f"Not yet: with W {outputs} x {inputs} and rank {rank}, your function raises {type(error).__name__}: "
                f"{str(error).splitlines()[0] if str(error) else 'no message'}."
            )
        wanted = before + alpha / rank * b @ a
        if not torch.equal(weight, before):
            return print(
                "Not yet: your function changes the W that it was given. Return a new tensor: in-place += writes into the model."
            )
        if merged.shape != wanted.shape:
            return print(
                f"Not yet: W is {outputs} x {inputs}, and your result is {' x '.join(map(str, merged.shape)) or 'one number'}."
            )
        if not torch.allclose(merged, wanted, atol=1e-4):
            return print(f"Not yet: {_merge_hint(merged, before, a, b, alpha, rank)}")
    print(
        "Right, for three shapes. That is all a merge is: afterwards, the layer costs what it cost before, and the adapter is gone."
    )


def check_prompt(answer: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Does `answer(messages)` write what the tokenizer's chat template writes, ready for the model's answer?"""
    if answer is None:
        return print("Your turn: write the function, then hand it to the check.")
    if not callable(answer):
        return print("Not yet: the check needs the function itself, without brackets.")
    for messages in CONVERSATIONS:
        messages, wanted = _rendered(messages, tokenizer)
        try:
            given = answer([dict(message) for message in messages])
        except Exception as error:
            return print(f"Not yet: your function raises {type(error).__name__}: {error}.")
        if not isinstance(given, str):
            return print(f"Not yet: the result must be a text, and yours is of the type {type(given).__name__}.")
        if given != wanted:
            return print(f"Not yet: {_first_difference(given, wanted)}")
    print(
        "Right, to the last line break. This is what a Modelfile must say; one character off, and the model reads what it was never trained on."
    )


def _rendered(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> tuple[list[dict[str, str]], str]:
    """The conversation and what the template writes for it; without its system message where the template knows none."""
    try:
        return messages, tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except TemplateError:  # as in Gemma
        return messages[1:], tokenizer.apply_chat_template(messages[1:], tokenize=False, add_generation_prompt=True)


def _sizes(adapter: Path, rank: int) -> tuple[float, float, float]:
    """MB of the LoRA tensors as they are, at another rank, and at that rank in 16 bit."""
    now = wanted = half = 0.0
    with safe_open(adapter / "adapter_model.safetensors", "pt") as weights:
        for name in weights.keys():  # noqa: SIM118
            shape, width = weights.get_slice(name).get_shape(), weights.get_tensor(name).element_size()
            other = shape[1] if ".lora_A." in name else shape[0]  # A is rank x inputs, B is outputs x rank
            now += shape[0] * shape[1] * width / 1e6
            wanted += rank * other * width / 1e6
            half += rank * other * 2 / 1e6
    return now, wanted, half


def _merge_hint(
    merged: torch.Tensor, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, alpha: int, rank: int
) -> str:
    change = merged - weight
    if torch.allclose(change, torch.zeros(()), atol=1e-6):
        return "the result is W itself. Add what A and B have learned."
    if torch.allclose(merged, alpha / rank * b @ a, atol=1e-4):
        return "that is the change alone. Add it to W."
    for factor in (1.0, alpha, 1 / rank, rank / alpha):
        if torch.allclose(change, factor * b @ a, atol=1e-4):
            return "B times A is there, the factor before it is not yet right: lora_alpha / r."
    return "the product is not B times A, in this order."


def _first_difference(given: str, wanted: str) -> str:
    same = next(
        (place for place, (one, other) in enumerate(zip(given, wanted)) if one != other), min(len(given), len(wanted))
    )
    where = f"the first {same} of {len(wanted)} characters are right, up to ...{given[max(0, same - 12) : same]!r}"
    if same == len(given):
        return f"{where}, and there yours ends."
    if same == len(wanted):
        return f"{where}, and yours goes on after that."
    return f"{where}; then look at what the template puts there, spaces and line breaks too."

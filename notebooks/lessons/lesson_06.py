"""Lesson 06: what folders hold, 16-bit models for a moment, and the checks of the exercises.

folder_table(run.adapter)                               # file by file, with megabytes
with plain_model(merged, plan) as model: ...            # 16-bit weights on this machine's device, gone afterwards
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2.exceptions import TemplateError
from safetensors.torch import load_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from helpers.config import TrainConfig
from helpers.models import load_quantized, release_last_model
from helpers.plan import Plan
from notebooks.lessons.scaffold import attempt, exercise, lora_trials, must_be, must_read, number, text

MB = 1e6  # as file managers and hubs count


def size_of(place: str | Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    place = Path(place)
    return sum(file.stat().st_size for file in ([place] if place.is_file() else place.rglob("*")) if file.is_file())


def folder_table(place: str | Path) -> pd.DataFrame:
    """The files of a folder with their sizes in MB, largest first."""
    files = [file for file in Path(place).rglob("*") if file.is_file()]
    sizes = {file.relative_to(place).as_posix(): round(size_of(file) / MB, 3) for file in files}
    return pd.Series(sizes, name="MB", dtype=float).rename_axis("file").sort_values(ascending=False).to_frame()


def size_table(places: Mapping[str, str | Path]) -> pd.DataFrame:
    """label -> file or folder, as a table of MB and of how many times the first one each is."""
    sizes = pd.Series({label: size_of(place) for label, place in places.items()}).rename_axis("what")
    return pd.DataFrame({"MB": sizes / MB, "times the first": sizes / sizes.iloc[0]}).round(1)


@contextmanager
def plain_model(folder: str | Path, plan: Plan) -> Iterator[PreTrainedModel]:
    """The model in `folder` without quantization, for evaluation; its memory comes back when the block ends.

    Its numbers are those that the plan calculates in: fp32 on a CPU, 16 bit on a card.
    """
    model, _ = load_quantized(TrainConfig(quantization="none"), replace(plan, model=str(folder)))
    try:
        yield model.eval()
    finally:
        release_last_model()


# ------------------------------------------------------------------------------------------- checks of the exercises

SYSTEM, USER = {"role": "system", "content": "You answer briefly."}, {"role": "user", "content": "Where is my kettle?"}
TALK = [{"role": "assistant", "content": "Hello Bao,"}, {"role": "user", "content": "Is the pan\nin stock? "}]
CONVERSATIONS = [
    [SYSTEM, USER],
    [SYSTEM, USER, *TALK],
    [USER, *TALK],
]  # some templates write a system message of their own


@exercise("a number, in megabytes", number)
def check_adapter_size(answer: float, adapter: str | Path, rank: int) -> str:
    """Is `answer` the megabytes (10^6 bytes) of this adapter's weights, had they been trained with another rank?"""
    weights = load_file(Path(adapter) / "adapter_model.safetensors")
    now = sum(weight.nbytes for weight in weights.values()) / MB
    # A is rank x inputs, B is outputs x rank.
    ranks = {name: weight.shape[0 if ".lora_A." in name else 1] for name, weight in weights.items()}
    wanted = sum(weight.nbytes * rank / ranks[name] for name, weight in weights.items()) / MB
    numbers = wanted * MB / next(iter(weights.values())).element_size()
    slips = [
        (now, "that is the size at the rank it was trained with."),
        (wanted * MB, "that is in bytes; wanted are megabytes of a million bytes."),
        (2 * numbers / MB, "that would be 16-bit numbers. The cell of section 2 prints the precision of the adapter."),
        (wanted**2 / now, "the rank is a side of each matrix once, not twice."),
    ]
    otherwise = "Look at the shapes: which side of A and which side of B is the rank? How do the bytes follow?"
    must_be(answer, wanted, slips, otherwise, within=0.02)
    return "Right. Both matrices of each pair have one side as long as the rank, so the size goes with it, exactly in proportion."


@exercise()
def check_merge(answer: Callable[..., Any]) -> str:
    """Does `answer(weight, a, b, alpha, rank)` give the merged weight?"""
    for given, (_, weight, a, b, alpha, rank) in lora_trials(answer, with_inputs=False):
        product, scale = b @ a, alpha / rank
        factor = "B times A is there, the factor before it is not yet right."
        slips = [
            (weight, "the result is W itself. Add what A and B have learned."),
            (scale * product, "that is the change alone. Add it to W."),
            *((weight + other * product, factor) for other in (1, alpha, 1 / rank, 1 / scale, alpha // rank)),
        ]
        must_be(given, weight + scale * product, slips, "the product is not B times A, in this order.")
    return "Right, for three shapes. That is all a merge is: afterwards, the layer costs what it cost before, and the adapter is gone."


@exercise()
def check_prompt(answer: Callable[[list[dict[str, str]]], Any], tokenizer: PreTrainedTokenizerBase) -> str:
    """Does `answer(messages)` write what the tokenizer's chat template writes, ready for the model's answer?"""
    for messages in CONVERSATIONS:
        try:
            wanted = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except TemplateError:  # as in Gemma, which knows no system message
            continue
        must_read(attempt(answer, [dict(message) for message in messages], kind=text), wanted)
    return "Right, to the last line break. This is what a Modelfile must say; one character off, and the model reads what it never saw."

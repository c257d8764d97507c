"""Training and validation parts that have nothing in common."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

from datasets import Dataset

from helpers.data.duplicates import Groups, Signatures, plain
from helpers.data.faults import DataError

NEAR = (
    0.6  # similarity that keeps two texts together: below the 0.7 that is reported, as the estimate may be off by 0.1
)
LABEL = 5  # an answer that more examples share is a label ("positive"), not a text whose leak would tell anything


def split(examples: Dataset, validation_share: float, seed: int) -> tuple[Dataset, Dataset]:
    """(training, validation): a seeded random split in which no question or answer of one part occurs in the other.

    Examples stay together if they come from one conversation, or if their question or answer is equal (ignoring case, spaces and
    punctuation) or nearly so. Only where that leaves too little to choose from, answers that many examples share may be on both sides.
    10 to 20 % is a usual share.
    """
    wanted = min(max(1, round(validation_share * len(examples))), max(1, len(examples) - 1))
    for strict in (True, False):
        groups = _groups(examples, strict)
        random.Random(seed).shuffle(groups)
        validation: list[int] = []
        for group in groups:
            if len(validation) + len(group) <= wanted:
                validation += group
        if not validation:
            validation = min(groups, key=len, default=[])
        if wanted / 2 <= len(validation) <= 2 * wanted:
            break
    held_out = set(validation)
    training = [index for index in range(len(examples)) if index not in held_out]
    if not training or not validation:
        raise DataError(
            f"{len(examples)} examples cannot be split into training and validation parts. Add examples that differ."
        )
    examples = examples.remove_columns([name for name in ("group",) if name in examples.column_names])
    return examples.select(training), examples.select(sorted(validation))


def _groups(examples: Dataset, strict: bool) -> list[list[int]]:
    """Indices that must stay together. Not `strict`: an answer that many examples share does not bind them."""
    groups = Groups(len(examples))
    first_with: dict[tuple[str, Any], int] = {}
    if "group" in examples.column_names:
        for index, group in enumerate(examples["group"]):
            groups.join(index, first_with.setdefault(("group", group), index))
    for part in (name for name in ("prompt", "completion", "text") if name in examples.column_names):
        signatures = Signatures()
        keys = []
        for value in examples[part]:
            text = value[-1]["content"] if isinstance(value, list) else value
            keys.append(plain(text) or text)
            signatures.add(text)
        often = (
            {key for key, count in Counter(keys).items() if count > LABEL}
            if part == "completion" and not strict
            else set()
        )
        for group in signatures.groups(NEAR).lists():
            for index in group:
                if keys[index] not in often:
                    groups.join(index, group[0] if keys[group[0]] not in often else index)
        for index, key in enumerate(keys):
            if key not in often:
                groups.join(index, first_with.setdefault((part, key), index))
    return groups.lists()

"""From a learner's file to examples that TRL understands.

    examples = load_examples("data_samples/customer_support.jsonl")
    training, validation = split(examples, validation_share=0.15, seed=42)

Every example becomes two lists of chat messages, `prompt` and `completion`: the form in which TRL applies the model's own chat
template and counts the loss on the completion only.
"""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

from datasets import Dataset
from datasets import logging as datasets_logging
from datasets.exceptions import DatasetGenerationError

datasets_logging.disable_progress_bar()


class DataError(ValueError):
    """The data cannot be used. The message names the file, the place and the fix."""


def load_examples(path: str | Path) -> Dataset:
    """Read Alpaca-style JSON lines (`instruction`, optional `input`, `output`) as prompt/completion messages.

    Raises:
        DataError: the file is missing, unreadable, lacks a column or holds an empty field.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"No data file at {path.resolve()}. Check the path, or copy your file there.")
    try:
        rows = Dataset.from_json(str(path), keep_in_memory=True)
    except (DatasetGenerationError, ValueError, StopIteration) as error:  # StopIteration: an empty file
        why = error.__cause__ or error or "it is empty"
        raise DataError(f"{path}: not readable as JSON lines ({why}). Each line must be one JSON object.") from None
    missing = {"instruction", "output"} - set(rows.column_names)
    if missing:
        raise DataError(
            f"{path}: no column {', '.join(sorted(missing))}; found {', '.join(rows.column_names)}. "
            "Name the question 'instruction' and the answer 'output'."
        )
    for number, row in enumerate(rows, start=1):
        for field in ("instruction", "output"):
            if not isinstance(row[field], str) or not row[field].strip():
                raise DataError(f"{path}, example {number}: {field!r} is empty. Fill it in or delete the example.")
    return rows.map(to_messages, remove_columns=rows.column_names)


def to_messages(row: dict[str, Any]) -> dict[str, list[dict[str, str]]]:
    """One Alpaca row as chat messages; `input` (context for the instruction) follows it after an empty line."""
    context = (row.get("input") or "").strip()
    question = row["instruction"].strip() + (f"\n\n{context}" if context else "")
    return {
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": row["output"].strip()}],
    }


def split(examples: Dataset, validation_share: float, seed: int) -> tuple[Dataset, Dataset]:
    """(training, validation): a seeded random split in which no question or answer of one part occurs in the other.

    Examples that share a question or an answer (ignoring case, spaces and punctuation) are one group, and a group stays whole.
    """
    groups = _groups_of_equal_text(examples)
    random.Random(seed).shuffle(groups)
    wanted = round(validation_share * len(examples))
    validation: list[int] = []
    while groups and len(validation) < wanted:
        validation += groups.pop()
    training = [index for group in groups for index in group]
    if not training or not validation:
        raise DataError(f"{len(examples)} examples cannot be split into training and validation parts. Add examples.")
    return examples.select(sorted(training)), examples.select(sorted(validation))


def _groups_of_equal_text(examples: Dataset) -> list[list[int]]:
    """Indices grouped so that equal questions and equal answers share a group (union-find over the texts)."""
    parent = list(range(len(examples)))

    def root(index: int) -> int:
        while parent[index] != index:
            index = parent[index]
        return index

    first_with: dict[tuple[str, str], int] = {}
    for index, example in enumerate(examples):
        for part in ("prompt", "completion"):
            key = (part, re.sub(r"\W+", " ", example[part][-1]["content"].lower()).strip())
            parent[root(index)] = root(first_with.setdefault(key, index))
    groups: dict[int, list[int]] = {}
    for index in range(len(examples)):
        groups.setdefault(root(index), []).append(index)
    return list(groups.values())

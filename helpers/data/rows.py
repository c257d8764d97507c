"""One record on its way through the check: what it says, where it stands, and what is wrong with it alone.

row = to_row(record)            # a Row, or the Problem that keeps it from being used
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

from helpers.data.content import is_broken
from helpers.data.faults import Problem
from helpers.data.files import Record
from helpers.data.formats import TEXT, Example, texts_of, to_examples
from helpers.data.reading import is_held_out
from helpers.data.report import Place


class Row(NamedTuple):
    """A record that can be used, as examples."""

    record: Record
    form: str
    examples: list[Example]

    @property
    def place(self) -> Place:
        return Place((self.record.file, self.record.line))

    @property
    def digest(self) -> bytes:
        """12 bytes that stand for everything the row says: equal for exact duplicates only."""
        return hashlib.blake2b(repr(self.examples).encode("utf-8", "replace"), digest_size=12).digest()

    @property
    def held_out(self) -> bool:
        """Does the row itself (column `split`) or the name of its file say that it is for validation or testing?"""
        own = self.record.value.get("split")
        return is_held_out(own) if isinstance(own, str) else is_held_out(self.record.file)


def to_row(record: Record) -> Row | Problem:
    """The record as examples, or why it cannot be used."""
    outcome = record.problem or to_examples(record.value)
    if isinstance(outcome, Problem):
        return outcome
    form, examples = outcome
    if any(is_broken(text) for text in texts_of(examples[-1])):
        return Problem("broken characters", "it holds half characters, as a wrong encoding leaves them")
    if form != TEXT and any(_echoes(example) for example in examples):
        return Problem("echo", "the answer only repeats the question")
    return Row(record, form, examples)


def _echoes(example: Example) -> bool:
    return example["prompt"][-1]["content"].strip().casefold() == example["completion"][0]["content"].strip().casefold()

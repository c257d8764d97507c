"""Everything that can be wrong with a row, in one table: what it is called, whether the row is set aside, and the fix.

    FAULTS["echo"].fix

A row that cannot be used is set aside (`rejects`); the others are kept, and the report points at them.
"""

from __future__ import annotations

from typing import NamedTuple


class DataError(ValueError):
    """The data cannot be used. The message names the file, the place and the fix."""


class Fault(NamedTuple):
    """One kind of mistake."""

    name: str
    fix: str
    rejects: bool = True


class Problem(NamedTuple):
    """One mistake in one row: the code of its `Fault`, and a sentence that says what is wrong here."""

    code: str
    reason: str


FAULTS: dict[str, Fault] = {
    # --- set aside: what the parser could not read
    "broken line": Fault("broken lines", "Mend the line, or delete it: each row must be complete on its own."),
    "unreadable rest": Fault(
        "unreadable rest of a file", "Mend the file at this place, then check it again: nothing after it was read."
    ),
    "not an object": Fault(
        "rows that are not objects", 'Write each row as one JSON object, {"instruction": ..., "output": ...}.'
    ),
    "broken characters": Fault(
        "text that no encoding can hold", "Save the file as UTF-8 and delete the characters that do not show."
    ),
    # --- set aside: what a row lacks
    "missing column": Fault(
        "rows without a question or an answer column", "Name the question 'instruction' and the answer 'output'."
    ),
    "empty": Fault("empty fields", "Fill the field in, or delete the row."),
    "wrong type": Fault("fields of a wrong type", 'Write the field as text: "42" in quotes, not 42, not a list.'),
    "echo": Fault("answers that only repeat the question", "Write a real answer, or delete the row."),
    "duplicate": Fault("exact duplicates", "Delete them: a row that occurs twice is learned twice."),
    # --- set aside: conversations
    "unknown role": Fault("unknown roles", "Use the roles system, user and assistant."),
    "role order": Fault(
        "roles in the wrong order", "At most one system message first; then user and assistant take turns, user first."
    ),
    "ends with user": Fault("conversations that end with the user", "Add the answer, or delete the last question."),
    "no answer": Fault(
        "conversations in which nothing is trained",
        "Add an assistant message (of weight 1, where messages have weights).",
    ),
    "other form": Fault(
        "plain text among questions and answers, or the reverse",
        "Move them to a file of their own and train them apart.",
    ),
    # --- set aside: only a tokenizer can see these
    "too long": Fault(
        "answers longer than the sequence length",
        "Raise max_length, or shorten them; truncate=True keeps them cut, without an end.",
    ),
    "nothing left": Fault(
        "questions that fill the sequence length alone",
        "Raise max_length, or shorten the question: no token of the answer is left.",
    ),
    "template": Fault(
        "conversations that the model's chat template refuses", "Change them (often: no system message), or the model."
    ),
    # --- kept, worth a look
    "cut": Fault(
        "answers that will be cut",
        "Raise max_length: a cut answer has no end token, so the model learns not to stop.",
        False,
    ),
    "near duplicate": Fault(
        "near duplicates", "Keep the better one of each group; the split keeps them together.", False
    ),
    "leak": Fault(
        "validation examples that also stand in training",
        "Delete them from one part: a score on known questions says nothing.",
        False,
    ),
    "repeated answer": Fault(
        "one answer repeated over many questions",
        "Fine for labels; otherwise vary it, or the model learns to say only this.",
        False,
    ),
    "mojibake": Fault(
        "garbled characters (mojibake)", "Read the original in its true encoding and save it as UTF-8.", False
    ),
    "control characters": Fault(
        "invisible control characters", "Delete them: the model would learn to write them.", False
    ),
    "private": Fault(
        "what looks private (addresses, phone numbers, keys)",
        "Replace it: a model can recite what it was trained on.",
        False,
    ),
    "language": Fault(
        "another language than most answers", "Keep it if you mean it; otherwise move it to a file of its own.", False
    ),
}

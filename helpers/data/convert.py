"""One value from a file: is it text, is it a list however it is dressed, and what to call it in a message.

One record in, examples out: recognizes how questions and answers are written down, whatever the file was.

    form, examples = to_examples({"question": "Why?", "answer": "Because."})

Recognised: Alpaca and its relatives (a question and an answer column, perhaps context, system prompt and history), chat
`messages` (OpenAI), ShareGPT `conversations`, prompt and completion messages (TRL), and plain `text`. A conversation with k
assistant turns becomes k examples, each with all that was said before as its prompt. Pure functions of a dict.
"""

from __future__ import annotations

import ast
import json
from functools import lru_cache
from typing import Any

from helpers.data.issues import Problem

LONGEST_REPR = 1_000_000  # characters of a Python list in a cell that we are willing to parse


def parsed_list(value: Any) -> list[Any] | None:
    """A list, however it is dressed: an array, JSON or Python text in a table's cell, or a dict of columns."""
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            try:
                value = ast.literal_eval(value) if len(value) <= LONGEST_REPR else None
            except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
                return None
    if hasattr(value, "tolist"):  # a numpy array, as pandas reads lists from Parquet
        value = value.tolist()
    if isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
        value = [dict(zip(value, row)) for row in zip(*value.values())]
    return list(value) if isinstance(value, (list, tuple)) else None


def not_text(place: str, value: Any) -> Problem | None:
    """What is wrong with a value that must be text with something in it."""
    name = place if "turn" in place and "'" in place else repr(place)
    if value is None or (isinstance(value, str) and not value.strip()):
        return Problem("empty", f"{name} is empty")
    return None if isinstance(value, str) else Problem("wrong type", f"{name} is {type_name(value)}, not text")


def type_name(value: Any) -> str:
    kinds = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
        str: "text",
        bytes: "raw bytes",
    }
    return "null" if value is None else kinds.get(type(value), f"a {type(value).__name__}")


Message = dict[str, str]
Example = dict[str, Any]
CHAT, TEXT = "chat", "text"  # the two forms that come out

# Column names, best first; compared without case, and with spaces and hyphens as underscores.
QUESTION = ("instruction", "question", "prompt", "query", "problem", "request", "user", "human", "input")
ANSWER = ("output", "response", "answer", "completion", "reply", "assistant", "target", "solution")
CONTEXT = ("input", "context", "passage")
SYSTEM = ("system", "system_prompt", "system_message")
TURNS = ("messages", "conversations", "conversation", "dialogue", "dialog")
PLAIN = ("text", "content")
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "bing": "assistant",
    "bard": "assistant",
}


def to_examples(record: Any) -> tuple[str, list[Example]] | Problem:
    """(form, examples) of one record, or what is wrong with it. Columns that are null count as absent."""
    if not isinstance(record, dict):
        return Problem("not an object", f"this is {type_name(record)}, not an object with named columns")
    record = {str(name): value for name, value in record.items()}
    columns = _recognize(tuple(name for name, value in record.items() if value is not None))
    if columns is None:
        return _unrecognized(record)
    values = {part: record[name] for part, name in columns.items()}
    if "turns" in columns:
        return _from_turns(columns["turns"], values["turns"], values.get("system"))
    if "text" in columns:
        return _from_text(columns["text"], values["text"])
    if isinstance(values["question"], list) and isinstance(values["answer"], list):  # TRL: both are lists of messages
        return _from_turns(
            columns["question"], values["question"] + values["answer"], None, only_after=len(values["question"])
        )
    return _from_pair(columns, values)


def used_columns(record: dict[str, Any]) -> set[str]:
    """The columns that `to_examples` reads of this record; the others are not trained on."""
    columns = _recognize(tuple(str(name) for name, value in record.items() if value is not None))
    return set((columns or {}).values())


def texts_of(example: Example) -> list[str]:
    """Every text in an example, in order."""
    return (
        [example["text"]]
        if "text" in example
        else [message["content"] for message in example["prompt"] + example["completion"]]
    )


@lru_cache(maxsize=4096)
def _recognize(names: tuple[str, ...]) -> dict[str, str] | None:
    """Part (question, answer, context, system, history, turns, text) -> the column that holds it; None if nothing fits."""
    by_plain_name = {}
    for name in names:
        by_plain_name.setdefault(name.strip().lstrip("\ufeff").lower().replace(" ", "_").replace("-", "_"), name)

    def first(wanted: tuple[str, ...], taken: str | None = None) -> str | None:
        return next(
            (by_plain_name[name] for name in wanted if name in by_plain_name and by_plain_name[name] != taken), None
        )

    turns, question, answer, text = first(TURNS), first(QUESTION), first(ANSWER), first(PLAIN)
    if turns:
        found = {"turns": turns, "system": first(SYSTEM)}
    elif question and answer:
        context = first(CONTEXT, taken=question)
        found = {
            "question": question,
            "answer": answer,
            "context": context,
            "system": first(SYSTEM),
            "history": first(("history",)),
        }
    elif text and not question and not answer:
        found = {"text": text}
    else:
        return None
    return {part: name for part, name in found.items() if name}


def _unrecognized(record: dict[str, Any]) -> Problem:
    """Why no format fits: a null where the answer should be, or other columns than ours."""
    columns = _recognize(tuple(map(str, record)))
    if columns:
        empty = [name for name in columns.values() if record.get(name) is None]
        return Problem("empty", f"{', '.join(map(repr, empty))} is empty")
    names = [str(name) for name in record]
    found = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    has_question = any(name.strip().lower() in QUESTION for name in names)
    has_answer = any(name.strip().lower() in ANSWER for name in names)
    lacking = (
        "answer"
        if has_question and not has_answer
        else "question"
        if has_answer and not has_question
        else "question and answer"
    )
    return Problem("missing column", f"no column for the {lacking}; found {found[:300] or 'no column at all'}")


def _from_text(column: str, value: Any) -> tuple[str, list[Example]] | Problem:
    problem = not_text(column, value)
    return problem or (TEXT, [{"text": value}])


def _from_pair(columns: dict[str, str], values: dict[str, Any]) -> tuple[str, list[Example]] | Problem:
    """Question and answer columns; the context follows the question after an empty line."""
    for part in ("question", "answer"):
        problem = not_text(columns[part], values[part])
        if problem:
            return problem
    for part in ("context", "system"):
        value = values.get(part)
        if isinstance(value, (dict, list)) and not value:
            values[part] = None
        elif value is not None and not isinstance(value, str):
            return Problem("wrong type", f"{columns[part]!r} is {type_name(value)}, not text")
    messages = _system(values.get("system"))
    for turn in parsed_list(values.get("history")) or []:
        if (
            not isinstance(turn, (list, tuple))
            or len(turn) != 2
            or not all(isinstance(text, str) and text.strip() for text in turn)
        ):
            return Problem("wrong type", f"{columns['history']!r} must be a list of [question, answer] pairs of text")
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    context = (values.get("context") or "").strip()
    messages.append({"role": "user", "content": values["question"].strip() + (f"\n\n{context}" if context else "")})
    return CHAT, [{"prompt": messages, "completion": [{"role": "assistant", "content": values["answer"].strip()}]}]


def _from_turns(column: str, value: Any, system: Any, only_after: int = 0) -> tuple[str, list[Example]] | Problem:
    """A conversation: one example for each assistant turn. `only_after`: earlier turns are context and are not trained."""
    turns = parsed_list(value)
    if not turns:
        empty = turns == [] or (isinstance(value, str) and not value.strip())
        return (
            Problem("empty", f"{column!r} is empty")
            if empty
            else Problem("wrong type", f"{column!r} is {type_name(value)}, not a list")
        )
    messages = _system(system) if isinstance(system, str) else []
    examples = []
    only_after += len(messages)
    for number, turn in enumerate(turns, start=1):
        message = _message(turn, f"{column!r}, turn {number}")
        if isinstance(message, Problem):
            return message
        expected = (
            {"system": ("user",), "user": ("assistant",), "assistant": ("user",)}[messages[-1]["role"]]
            if messages
            else ("system", "user")
        )
        if message["role"] not in expected:
            said = f"turn {number} is {message['role']}, expected {' or '.join(expected)}"
            return Problem("role order", f"{column!r}: {said}")
        if message["role"] == "assistant" and len(messages) >= only_after and turn.get("weight", 1) != 0:
            examples.append({"prompt": list(messages), "completion": [message]})
        messages.append(message)
    if messages[-1]["role"] == "user":
        return Problem(
            "ends with user", f"{column!r}: the last of {len(turns)} turns is the user's, so it has no answer"
        )
    if not examples:
        return Problem("no answer", f"{column!r} holds no assistant turn to train on")
    return CHAT, examples


def _message(turn: Any, place: str) -> Message | Problem:
    """One turn as {"role", "content"}; understands role/content, from/value and OpenAI's lists of text parts."""
    if not isinstance(turn, dict):
        return Problem("wrong type", f"{place} is {type_name(turn)}, not an object with role and content")
    role = turn.get("from") if turn.get("role") is None else turn["role"]
    if not isinstance(role, str) or role.strip().lower() not in ROLES:
        shown = "missing" if role is None else f"{role!r:.60}"
        return Problem(
            "unknown role", f"{place}: the role is {shown}; known are system, user (human) and assistant (gpt)"
        )
    content = next((turn[key] for key in ("content", "value", "text") if turn.get(key) is not None), None)
    if (
        isinstance(content, list)
        and content
        and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content)
    ):
        content = "".join(part["text"] for part in content)
    problem = not_text(place, content)
    return problem or {"role": ROLES[role.strip().lower()], "content": content}


def _system(value: Any) -> list[Message]:
    return [{"role": "system", "content": value.strip()}] if isinstance(value, str) and value.strip() else []

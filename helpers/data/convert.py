"""One record in, examples out: recognizes how questions and answers are written down, whatever the file was.

    form, examples = to_examples({"question": "Why?", "answer": "Because."})

Recognized: Alpaca and its relatives (a question and an answer column, perhaps context, system prompt and history), chat
`messages` (OpenAI), ShareGPT `conversations`, prompt and completion messages (TRL), and plain `text`. A conversation
with k assistant turns becomes k examples, each with all that was said before as its prompt. Pure functions of a dict.
"""

from __future__ import annotations

import ast
import json
from functools import lru_cache
from numbers import Real
from typing import Any

from helpers.data.issues import LONGEST_ROW, TOO_LONG, Issue, is_broken

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
ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user"}
ROLES |= dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model", "bing", "bard"), "assistant")
NEXT_ROLES = {"": ("system", "user"), "system": ("user",), "user": ("assistant",), "assistant": ("user",)}
TYPE_NAMES = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object", str: "text"}
MOST_TURNS = 1000  # of a conversation, as each example holds all that was said before
LONGEST_LITERAL = 1_000_000  # characters of a Python list in a table's cell that we are willing to parse


def to_examples(record: Any) -> tuple[str, list[Example]] | Issue:
    """(form, examples) of one record, or what is wrong with it. Columns that are null count as absent."""
    outcome = _from_record(record)
    if isinstance(outcome, Issue):
        return outcome
    said = [texts_of(example) for example in outcome[1]]
    if sum(len(text) for texts in said for text in texts) > LONGEST_ROW:
        return TOO_LONG
    if any(is_broken(text) for text in said[-1]):
        return Issue("broken characters", "it holds half characters, as a wrong encoding leaves them")
    for *_, question, answer in said if outcome[0] != TEXT else []:
        if question.strip().casefold() == answer.strip().casefold():
            return Issue("echo", "the answer only repeats the question")
    return outcome


def _from_record(record: Any) -> tuple[str, list[Example]] | Issue:
    if not isinstance(record, dict):
        return Issue("not an object", f"this is {_type_name(record)}, not an object with named columns")
    record = {str(name): value for name, value in record.items()}
    columns = _recognize(tuple(name for name, value in record.items() if value is not None))
    if columns is None:
        return _unrecognized(record)
    values = {part: record[name] for part, name in columns.items()}
    if "turns" in columns:
        return _from_turns(columns["turns"], values["turns"], values.get("system"))
    if "text" in columns:
        return _not_text(repr(columns["text"]), values["text"]) or (TEXT, [{"text": values["text"]}])
    question, answer = values["question"], values["answer"]
    if isinstance(question, list) and isinstance(answer, list):  # TRL: both are lists of messages
        return _from_turns(columns["question"], question + answer, None, only_after=len(question))
    return _from_pair(columns, values)


def used_columns(record: dict[str, Any]) -> set[str]:
    """The columns that `to_examples` reads of this record; the others are not trained on."""
    columns = _recognize(tuple(str(name) for name, value in record.items() if value is not None))
    return set((columns or {}).values())


def texts_of(example: Example) -> list[str]:
    """Every text in an example, in order."""
    if "text" in example:
        return [example["text"]]
    return [message["content"] for message in example["prompt"] + example["completion"]]


@lru_cache(maxsize=4096)
def _recognize(names: tuple[str, ...]) -> dict[str, str] | None:
    """Part (question, answer, context, system, history, turns, text) -> its column; None if nothing fits."""
    known: dict[str, str] = {}
    for name in names:
        known.setdefault(name.strip().lstrip("\ufeff").lower().replace(" ", "_").replace("-", "_"), name)

    def first(wanted: tuple[str, ...], taken: str | None = None) -> str | None:
        return next((known[name] for name in wanted if name in known and known[name] != taken), None)

    question, answer, text = first(QUESTION), first(ANSWER), first(PLAIN)
    parts = {"system": first(SYSTEM)}
    if turns := first(TURNS):
        parts["turns"] = turns
    elif question and answer:
        parts |= {"question": question, "answer": answer, "context": first(CONTEXT, taken=question)}
        parts["history"] = known.get("history")
    elif text and not question and not answer:
        parts = {"text": text}
    else:
        return None
    return {part: name for part, name in parts.items() if name}


def _unrecognized(record: dict[str, Any]) -> Issue:
    """Why no format fits: a null where the answer should be, or other columns than ours."""
    if columns := _recognize(tuple(record)):
        empty = [repr(name) for name in columns.values() if record[name] is None]
        return Issue("empty", f"{', '.join(empty)} is empty")
    present = {name.strip().lower() for name in record}
    lacking = [part for part, names in (("question", QUESTION), ("answer", ANSWER)) if not present & set(names)]
    found = ", ".join(list(record)[:8]) + ", ..." * (len(record) > 8)
    what = " and ".join(lacking or ["question and answer"])
    return Issue("missing column", f"no column for the {what}; found {found[:300] or 'no column at all'}")


def _from_pair(columns: dict[str, str], values: dict[str, Any]) -> tuple[str, list[Example]] | Issue:
    """Question and answer columns; the context follows the question after an empty line."""
    for part in ("question", "answer"):
        if issue := _not_text(repr(columns[part]), values[part]):
            return issue
    for part in ("context", "system"):
        value = values.setdefault(part, "")
        is_empty = isinstance(value, (dict, list)) and not value
        if not isinstance(value, str) and not is_empty:
            return Issue("wrong type", f"{columns[part]!r} is {_type_name(value)}, not text")
    messages = _system(values["system"])
    history = values.get("history", "")
    turns = [] if isinstance(history, str) and not history.strip() else _as_list(history)
    for turn in turns or ([] if turns == [] else [None]):
        is_pair = isinstance(turn, (list, tuple)) and len(turn) == 2
        if not is_pair or any(_not_text("", text) for text in turn):
            return Issue("wrong type", f"{columns['history']!r} must be a list of [question, answer] pairs of text")
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    context = (values["context"] or "").strip()
    messages.append({"role": "user", "content": values["question"].strip() + (f"\n\n{context}" if context else "")})
    return CHAT, [{"prompt": messages, "completion": [{"role": "assistant", "content": values["answer"].strip()}]}]


def _from_turns(column: str, value: Any, system: Any, only_after: int = 0) -> tuple[str, list[Example]] | Issue:
    """A conversation: one example for each assistant turn. Turns before number `only_after` are not trained."""
    turns = _as_list(value)
    if not turns or len(turns) > MOST_TURNS:
        is_empty = turns == [] or (isinstance(value, str) and not value.strip())
        wrong = Issue("wrong type", f"{column!r} is {_type_name(value)}, not a list")
        return TOO_LONG if turns else Issue("empty", f"{column!r} is empty") if is_empty else wrong
    messages = _system(system)
    only_after += len(messages)
    examples = []
    for number, turn in enumerate(turns, start=1):
        message = _message(turn, f"{column!r}, turn {number}")
        if isinstance(message, Issue):
            return message
        expected = NEXT_ROLES[messages[-1]["role"] if messages else ""]
        if message["role"] not in expected:
            reason = f"turn {number} is {message['role']}, expected {' or '.join(expected)}"
            return Issue("role order", f"{column!r}: {reason}")
        if message["role"] == "assistant" and len(messages) >= only_after and turn.get("weight", 1) != 0:
            examples.append({"prompt": list(messages), "completion": [message]})
        messages.append(message)
    if messages[-1]["role"] == "user":
        return Issue("ends with user", f"{column!r}: the last of {len(turns)} turns is the user's, so it has no answer")
    if not examples:
        return Issue("no answer", f"{column!r} holds no assistant turn to train on")
    return CHAT, examples


def _message(turn: Any, place: str) -> Message | Issue:
    """One turn as {"role", "content"}; understands role/content, from/value and OpenAI's lists of text parts."""
    if not isinstance(turn, dict):
        return Issue("wrong type", f"{place} is {_type_name(turn)}, not an object with role and content")
    role = turn.get("from") if turn.get("role") is None else turn["role"]
    if not isinstance(role, str) or role.strip().lower() not in ROLES:
        shown = "missing" if role is None else f"{role!r:.60}"
        return Issue("unknown role", f"{place}: the role is {shown}; known are system, user (human), assistant (gpt)")
    weight = turn.get("weight")
    if weight is not None and (not isinstance(weight, Real) or weight not in (0, 1)):
        return Issue("wrong type", f"{place}: the weight is {weight!r:.60}; known are 0 and 1")
    content: Any = next((turn[key] for key in ("content", "value", "text") if turn.get(key) is not None), None)
    if isinstance(content, list) and content:
        texts = [part.get("text") if isinstance(part, dict) else None for part in content]
        content = content if any(not isinstance(text, str) for text in texts) else "".join(map(str, texts))
    return _not_text(place, content) or {"role": ROLES[role.strip().lower()], "content": content}


def _system(value: Any) -> list[Message]:
    return [{"role": "system", "content": value.strip()}] if isinstance(value, str) and value.strip() else []


def _as_list(value: Any) -> list[Any] | None:
    """A list, however it is dressed: an array, JSON or Python text in a table's cell, or a dict of columns."""
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            try:
                value = ast.literal_eval(value) if len(value) <= LONGEST_LITERAL else None
            except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
                return None
    if hasattr(value, "tolist"):  # a numpy array, as pandas reads lists from Parquet
        value = value.tolist()
    if isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
        value = [dict(zip(value, row)) for row in zip(*value.values())]
    return list(value) if isinstance(value, (list, tuple)) else None


def _not_text(place: str, value: Any) -> Issue | None:
    """What is wrong with a value that must be text with something in it."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return Issue("empty", f"{place} is empty")
    return None if isinstance(value, str) else Issue("wrong type", f"{place} is {_type_name(value)}, not text")


def _type_name(value: Any) -> str:
    return "null" if value is None else TYPE_NAMES.get(type(value), f"a {type(value).__name__}")

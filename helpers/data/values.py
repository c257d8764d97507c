"""One value from a file: is it text, is it a list however it is dressed, and what to call it in a message."""

from __future__ import annotations

import ast
import json
from typing import Any

from helpers.data.faults import Problem

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

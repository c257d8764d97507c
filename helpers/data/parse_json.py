"""JSON in, records out: lines, arrays, objects one after the other, and objects that wrap a table.

A broken line costs only itself. In an array, nobody can say where the next element begins after a broken one, so the rest is one record
with a problem.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from helpers.data.faults import Problem
from helpers.data.files import DataFile, Record

MAX_NESTING = "nested too deeply"


def lines(file: DataFile) -> Iterator[Record]:
    """JSON lines, streamed: a line that is broken is one record with a problem, and reading goes on."""
    with file.text() as text:
        for number, line in enumerate(text, start=1):
            if line.strip().strip("\ufeff"):
                value, problem = _loads(line.strip().strip("\ufeff"), number)
                yield Record(value, file.name, number, problem)


def array(file: DataFile) -> Iterator[Record]:
    """A JSON array, element by element. After a broken one, the rest of the file is one record with a problem."""
    with file.text() as stream:
        yield from _values(stream.read(), file.name, array=True)


def objects(file: DataFile) -> Iterator[Record]:
    """One JSON object, or several one after the other. An object that only wraps lists of rows ({"data": [...]}) is unwrapped."""
    with file.text() as stream:
        text = stream.read()
    records = list(_values(text, file.name, array=False))
    if len(records) == 1 and isinstance(records[0].value, dict):
        rows = _unwrap(records[0].value)
        if rows:
            yield from (Record(row, file.name, number) for number, row in enumerate(rows, start=1))
            return
    yield from records


def _values(text: str, name: str, array: bool) -> Iterator[Record]:
    """JSON values that follow each other, with the line on which each begins."""
    decoder, space = json.JSONDecoder(), re.compile(r"[\ufeff \t\r\n,]*" if array else r"[\ufeff \t\r\n]*")
    position = space.match(text).end() + array
    line, counted = 1, 0
    while True:
        position = space.match(text, position).end()
        line, counted = line + text.count("\n", counted, position), position
        rest = text[position : position + 1]
        if rest == "" and not array:
            return
        if rest == "]" and array:
            position = space.match(text, position + 1).end()
            if position < len(text):
                reason = (
                    f"line {line + text.count(chr(10), counted, position)}: there is more text after the array's end"
                )
                yield Record(text[position:], name, line, Problem("unreadable rest", reason))
            return
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            place = (
                f"line {error.lineno}, column {error.colno}: {error.msg}"
                if isinstance(error, json.JSONDecodeError)
                else MAX_NESTING
            )
            if rest == "":
                place = f"line {line}: the file ends before the array does"
            yield Record(
                text[position:], name, line, Problem("unreadable rest", f"not readable as JSON from here on ({place})")
            )
            return
        yield Record(value, name, line)


def _loads(text: str, line: int) -> tuple[Any, Problem | None]:
    try:
        return json.loads(text), None
    except json.JSONDecodeError as error:
        return text, Problem("broken line", f"not readable as JSON: {error.msg} (line {line}, column {error.colno})")
    except (ValueError, RecursionError):  # a number of thousands of digits, or thousands of brackets
        return text, Problem("broken line", f"not readable as JSON: {MAX_NESTING}, or a number too long (line {line})")


def is_json(text: str) -> bool:
    return _loads(text, 1)[1] is None


def _unwrap(value: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows in {"data": [row, ...]}, in {"column": [cell, ...], ...} or in what pandas writes, {"column": {"0": cell}, ...}."""
    lists = [
        rows
        for rows in value.values()
        if isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows)
    ]
    rows = [row for rows in lists for row in rows]
    if rows:
        is_conversation = all({"role", "content"} <= row.keys() or {"from", "value"} <= row.keys() for row in rows)
        return [] if is_conversation else rows
    columns = [list(cells.values()) if isinstance(cells, dict) else cells for cells in value.values()]
    if columns and all(isinstance(cells, list) and cells and len(cells) == len(columns[0]) for cells in columns):
        return [dict(zip(value, row)) for row in zip(*columns)]
    return []

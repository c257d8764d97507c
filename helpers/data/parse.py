"""One file in, records out: JSON, JSON lines, CSV, TSV and Parquet.

    for record in parse(DataFile("examples.csv", path)):
        record.value, record.line, record.issue

Parsing itself is the standard library's (json, csv) and pyarrow's; here we choose the parser, keep the line numbers, and turn
what cannot be parsed into a record with an `Issue`. One row is in memory at a time, except where JSON is one value.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

import psutil

from helpers.data.issues import LONGEST_ROW, TOO_LONG, DataError, Issue, first_line

if TYPE_CHECKING:
    from helpers.data.read import DataFile

LARGEST = 2 * 2**30  # bytes, also after unpacking: far more text than one card learns in a week
MOST_ROWS = 1_000_000  # the same in rows
COPIES, COPIES_WHOLE = 4, 8  # bytes of memory that a byte of data takes; where all of it is one value
HEAD = 65_536  # bytes (or characters) that tell formats apart
BATCH = 1000  # rows of Parquet read at once
BLANK = "\ufeff \t\r\n"  # what may stand before a value


class Record(NamedTuple):
    """One row as the parser gave it, and where it stands. `value` is a dict, or the raw text where `issue` says why."""

    value: Any
    file: str
    line: int
    issue: Issue | None = None
    part: str = ""  # where a source has it: in a file or folder of this name, or {"train": [row, ...], "test": ...}


def refuse_large(name: str, size: int = 0, rows: int = 0, copies: int = COPIES) -> None:
    """Raise `DataError` where so many bytes or rows are more than a card needs, or than fit into free memory."""
    most = min(LARGEST, psutil.virtual_memory().available // copies)
    if size > most or rows > MOST_ROWS:
        what = f"{MOST_ROWS:,} rows" if size <= most else f"the {most / 2**30:.1f} GiB that can be read here"
        fix = "Take the first 100,000 examples, as JSON lines: for fine-tuning, few good ones beat many."
        raise DataError(f"{name} has more than {what}. {fix}")


def parse(file: DataFile) -> Iterator[Record]:
    """Every record of one file, in order. Raises DataError if it is empty, binary, too large, or of no known format."""
    if file.head.startswith(b"PAR1"):
        yield from parquet(file)
        return
    with file.text() as text:
        head = text.read(HEAD)
    start, whole = head.lstrip(BLANK), len(head) < HEAD
    if whole and not start:
        raise DataError(f"{file.name} is empty. Choose the file that holds your examples.")
    yield from _parser(file, start, whole)(file)


def _parser(file: DataFile, start: str, whole: bool) -> Callable[[DataFile], Iterator[Record]]:
    """The parser for a text file: its first characters decide, and where they leave it open, its name."""
    first, _, others = start.partition("\n")
    is_value = _is_json(first)
    if file.kind == "jsonl":  # or one JSON array all the same: then its first line is no value of its own
        is_array = start[:1] == "[" and (not whole or start.rstrip().endswith("]"))
        return values if is_array and not (others.strip() and is_value) else lines
    is_table = file.kind in ("csv", "tsv")
    if start[:1] == "{" and (is_value or not is_table):
        return lines if others.strip() and is_value else values
    if start[:1] == "[" and (not is_table or start[1:].lstrip()[:1] in ("{", "")):
        return values
    if file.kind == "json":
        return values
    if is_table or "\t" in first or "," in first:
        return table
    raise DataError(f'{file.name} is neither JSON, CSV nor Parquet. Save plain text as lines of {{"text": "..."}}.')


def lines(file: DataFile) -> Iterator[Record]:
    """JSON lines: a line that is broken is one record with an issue, and reading goes on."""
    with file.text() as text:
        for number, line in enumerate(_bounded(text), start=1):
            if len(line) > LONGEST_ROW:
                yield Record(line[:BATCH], file.name, number, TOO_LONG)
            elif line := line.strip().strip("\ufeff"):
                try:
                    yield Record(STRICT.decode(line), file.name, number)
                except (KeyError, ValueError, RecursionError) as error:
                    reason = f"not readable as JSON: {_json_error(error, number)}"
                    yield Record(line, file.name, number, Issue("broken line", reason))


def _bounded(text: TextIO, quoted: bool = False) -> Iterator[str]:
    """Every line; of one that is longer than `LONGEST_ROW`, one character more than that.

    Where a row may be `quoted` over several lines, those that still belong to such a line are empty: it ends where quotes are even again.
    """
    quotes = 0
    while line := text.readline(LONGEST_ROW + 1):
        yield line
        too_long = len(line) > LONGEST_ROW
        quotes += line.count('"') if quoted else 0
        while too_long and (quotes % 2 or not line.endswith("\n")) and (more := text.readline(LONGEST_ROW + 1)):
            if line.endswith("\n"):
                yield "\n"
            quotes += more.count('"') if quoted else 0
            line = more


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, unless a name stands twice in it: Python would silently keep the last."""
    named = dict(pairs)
    if len(named) < len(pairs):
        name = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise KeyError(f"the name {name!r:.60} occurs twice in one object")
    return named


STRICT, LENIENT = json.JSONDecoder(object_pairs_hook=_unique), json.JSONDecoder()


def values(file: DataFile) -> Iterator[Record]:
    """A JSON array, or objects one after the other; one object that only wraps rows ({"data": [...]}) is unwrapped."""
    refuse_large(file.name, file.size, copies=COPIES_WHOLE)
    with file.text() as stream:
        text = stream.read()
    is_array = text.lstrip(BLANK)[:1] == "["
    records = _values(text, file.name, is_array)
    first = list(islice(records, 2))
    rows = _unwrap(first[0]) if len(first) == 1 and not is_array else []
    yield from rows or chain(first, records)


def _values(text: str, name: str, array: bool) -> Iterator[Record]:
    """JSON values one after the other, with the line on which each begins; after a broken one, all the rest."""
    between = re.compile(f"[{BLANK}{',' * array}]*")
    position = text.index("[") + 1 if array else 0
    line, counted = 1, 0
    while True:
        position = next(between.finditer(text, position)).end()
        line, counted = line + text.count("\n", counted, position), position
        following = text[position : position + 1]
        if following == "" and not array:
            return
        if following == "]" and array:
            if next(between.finditer(text, position + 1)).end() < len(text):
                issue = Issue("unreadable rest", f"line {line}: more text after the array's end")
                yield Record(text[position + 1 :][:LONGEST_ROW], name, line, issue)
            return
        try:
            (value, position), twice = _decode(text, position)
        except (ValueError, RecursionError) as error:
            reason = _json_error(error) if following else f"line {line}: the file ends before the array does"
            issue = Issue("unreadable rest", f"not readable as JSON from here on ({reason})")
            yield Record(text[position:][:LONGEST_ROW], name, line, issue)
            return
        yield Record(value, name, line, twice)


def _decode(text: str, position: int) -> tuple[tuple[Any, int], Issue | None]:
    """The value that begins at this position, and where it ends; and what is wrong with it, though it can be read."""
    try:
        return STRICT.raw_decode(text, position), None
    except KeyError as error:
        return LENIENT.raw_decode(text, position), Issue("broken line", _json_error(error))


def _json_error(error: Exception, line: int = 0) -> str:
    if isinstance(error, KeyError):
        return str(error.args[0])
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} (line {line or error.lineno}, column {error.colno})"
    return "nested too deeply, or a number too long" + (f" (line {line})" if line else "")


def _is_json(text: str) -> bool:
    try:
        return LENIENT.decode(text) is not STRICT
    except (ValueError, RecursionError):
        return False


def _unwrap(record: Record) -> list[Record]:
    """The rows in {"data": [row, ...]}, in {"column": [cell, ...], ...} or in pandas' {"column": {"0": cell}, ...}."""
    value = {} if record.issue or not isinstance(record.value, dict) else record.value
    parts = {name: rows for name, rows in value.items() if isinstance(rows, list)}
    named = [(name, row) for name, rows in parts.items() if all(isinstance(row, dict) for row in rows) for row in rows]
    if any({"role", "content"} <= row.keys() or {"from", "value"} <= row.keys() for _, row in named):
        return []
    columns = [list(cells.values()) if isinstance(cells, dict) else cells for cells in value.values()]
    if not named and all(isinstance(cells, list) and cells and len(cells) == len(columns[0]) for cells in columns):
        named = [("", dict(zip(value, row))) for row in zip(*columns)]
    return [Record(row, record.file, number, part=name) for number, (name, row) in enumerate(named, start=1)]


def table(file: DataFile) -> Iterator[Record]:
    """CSV or TSV. `strict` makes the csv module complain about a stray quote instead of swallowing the rest of the file."""
    delimiter = "\t" if file.kind == "tsv" else _delimiter(file)
    csv.field_size_limit(LONGEST_ROW)  # a field may be a whole article; the default is 131,072 characters
    with file.text(newline="") as text:
        # of a line that was cut, nothing must be taken for a row: it becomes one field that csv refuses
        bounded = (
            line if len(line) <= LONGEST_ROW else "x" * (LONGEST_ROW + 1) for line in _bounded(text, quoted=True)
        )
        rows = csv.reader(bounded, delimiter=delimiter, strict=True)
        header: list[str] = []
        while True:
            line = rows.line_num + 1
            try:
                row = next(rows, None)
            except (csv.Error, ValueError) as error:
                issue = _csv_issue(error, line)
                if not header:
                    raise DataError(f"{file.name} has no header that can be read: {issue.reason}. Mend it.") from None
                yield Record(f"line {line}", file.name, line, issue)
                continue
            if row is None:
                return
            if not row:
                continue
            if not header:
                header = [cell.strip().lstrip("\ufeff") for cell in row]
                refuse_twice(header, f"{file.name}, line {line}")
            elif len(row) != len(header):
                reason = f"{len(row)} fields, but the header has {len(header)}; a field with {delimiter!r} needs quotes"
                value = dict(zip(header, row)) | {"(fields)": row}
                yield Record(value, file.name, line, Issue("broken line", reason))
            else:
                yield Record(dict(zip(header, row)), file.name, line)


def _csv_issue(error: Exception, line: int) -> Issue:
    if "unexpected end of data" in str(error):
        return Issue("unreadable rest", f"a quote opened in line {line} is never closed")
    return TOO_LONG if "field limit" in str(error) else Issue("broken line", f"{error} (line {line})")


def _delimiter(file: DataFile) -> str:
    """The separator that gives the header the most columns: comma, or what Excel writes in other countries."""
    with file.text() as text:
        header = next((line for line in _bounded(text) if line.strip()), "")
    return max(",;\t|", key=header.count)


def refuse_twice(names: list[str], where: str) -> None:
    """Two columns of one name would hide each other."""
    if twice := [name for name, count in Counter(names).items() if name and count > 1]:
        raise DataError(f"{where}: two columns are named {twice[0]!r:.200}. Rename one of them.")


def parquet(file: DataFile) -> Iterator[Record]:
    """Parquet, up to a thousand rows at a time. `line` is the number of the row."""
    from pyarrow.parquet import ParquetFile

    with file.stream() as raw:
        try:
            source = ParquetFile(io.BytesIO(raw.read()) if file.packed else raw)
            names, groups = list(source.schema_arrow.names), range(source.num_row_groups)
        except Exception as error:  # pyarrow may fail in many ways on a damaged file
            why = f"({first_line(error)}). Download it again."
            raise DataError(f"{file.name} is not readable as Parquet {why}") from None
        refuse_twice(names, file.name)
        refuse_large(file.name, rows=source.metadata.num_rows)
        # a value that all rows share is stored once, so each row of a batch may be as large as its whole group
        largest = max((source.metadata.row_group(number).total_byte_size for number in groups), default=0)
        at_once = psutil.virtual_memory().available // (4 * COPIES_WHOLE) // max(1, largest)
        done = 0
        try:
            for batch in source.iter_batches(batch_size=max(1, min(BATCH, at_once))):
                for row in batch.to_pylist():
                    done += 1
                    yield Record(row, file.name, done)
        except Exception as error:
            reason = f"row {done + 1} onwards is damaged ({first_line(error)})"
            yield Record(None, file.name, done + 1, Issue("unreadable rest", reason))

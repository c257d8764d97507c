"""Bytes in, records out: JSON, JSON lines, CSV, TSV and Parquet, in any common encoding, plain or gzipped.

    for record in parse(DataFile("examples.csv", path)):
        record.value, record.line, record.problem

Parsing itself is the standard library's (json, csv, gzip) and pyarrow's; here we choose the parser, keep the line numbers and make
sure that what cannot be parsed becomes a record with a `Problem` instead of an exception. Nothing is read whole except a JSON array.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from helpers.data.faults import DataError
from helpers.data.files import SNIFFED, DataFile, Record
from helpers.data.parse_json import array, is_json, lines, objects
from helpers.data.parse_tables import parquet, table


def parse(file: DataFile) -> Iterator[Record]:
    """Every record of one file, in order.

    Raises:
        DataError: the file as a whole is not what it seems: empty, binary, too large, or of no known format.
    """
    if file.is_parquet():
        yield from parquet(file)
        return
    with file.text() as text:
        head = text.read(SNIFFED)
    if not head.strip("\ufeff \t\r\n") and len(head) < SNIFFED:
        raise DataError(f"{file.name} is empty. Choose the file that holds your examples.")
    yield from _reader(file, head)(file)


def _reader(file: DataFile, head: str) -> Callable[[DataFile], Iterator[Record]]:
    """The parser for a text file: its first characters decide, and where they leave it open, its name."""
    start = head.lstrip("\ufeff \t\r\n")
    first_line, _, others = start.partition("\n")
    is_object = start[:1] == "{" and (is_json(first_line) or file.kind not in ("csv", "tsv"))
    if file.kind == "jsonl":
        return array if _is_array(start, len(head) < SNIFFED) else lines
    if is_object:
        return lines if others.strip() and is_json(first_line) else objects
    if start[:1] == "[" and (file.kind not in ("csv", "tsv") or start[1:].lstrip()[:1] in ("{", "")):
        return array
    if file.kind in ("csv", "tsv"):
        return table
    if file.kind == "json":
        return objects
    if "\t" in first_line or "," in first_line:
        return table
    raise DataError(
        f"{file.name} is neither JSON, JSON lines, CSV, TSV nor Parquet. Save your examples as one of these; "
        'plain text as lines of {"text": "..."}.'
    )


def _is_array(start: str, whole: bool) -> bool:
    """Is a file named .jsonl one JSON array all the same? Then its first line is no value of its own, or its only line."""
    if start[:1] != "[" or (whole and not start.rstrip().endswith("]")):
        return False
    first_line, _, others = start.partition("\n")
    return not others.strip() or not is_json(first_line)

"""One file in, records out: JSON, JSON lines, CSV, TSV and Parquet, in any common encoding, plain or gzipped.

    for record in parse(DataFile("examples.csv", path)):
        record.value, record.line, record.issue

Parsing itself is the standard library's (json, csv, gzip) and pyarrow's; here we choose the parser, keep the line
numbers, and turn what cannot be parsed into a record with an `Issue` instead of an exception. Only JSON arrays and
gzipped files are held in memory whole.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import re
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TextIO

from helpers.data.issues import DataError, Issue, first_line

LARGEST = 2 * 2**30  # bytes, also after unpacking: far more text than one card learns in a week
TOO_LARGE = "has more than 2 GiB. Take the first 100,000 examples: for fine-tuning, few good ones beat many."
HEAD, CHUNK = 65_536, 1 << 20  # bytes (or characters) that tell formats apart, and bytes read at a time
KINDS = {".json": "json", ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "tsv", ".tab": "tsv"}
KINDS |= {".parquet": "parquet", ".txt": ""}
NOT_DATA = {
    b"PK\x03\x04": "an Excel file or a zip archive: save the sheet as CSV, or unpack the archive",
    b"%PDF": "a PDF: copy its questions and answers into a CSV or JSON lines file",
    b"\xd0\xcf\x11\xe0": "an old Office document: save it as CSV",
    b"ARROW1": "an Arrow file: save it as Parquet",
    b"\x80\x04\x95": "a pickle, which can run code: save it as Parquet",
}
NOT_DATA |= dict.fromkeys((b"\x28\xb5\x2f\xfd", b"BZh", b"\xfd7zXZ"), "packed with zstd, bzip2 or xz: unpack it")
MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
BLANK = "\ufeff \t\r\n"  # what may stand before a value

csv.field_size_limit(2**31 - 1)  # a field may be a whole article; the default stops at 131,072 characters


class Record(NamedTuple):
    """One row as the parser gave it, and where it stands. `value` is a dict, or the raw text where `issue` says why."""

    value: Any
    file: str
    line: int
    issue: Issue | None = None


class DataFile:
    """A file of examples: a path, or the bytes of an upload. A gzipped one is unpacked in memory.

    Raises:
        DataError: it cannot be read, or is too large, packed or unpacked.
    """

    def __init__(self, name: str, content: Path | bytes) -> None:
        self.name, self.content, self.kind = name, content, kind_of(name) or ""
        try:
            size = len(content) if isinstance(content, bytes) else content.stat().st_size
            if size <= LARGEST:
                with self.stream() as raw:
                    self.head = raw.read(HEAD)
                    if self.head.startswith(b"\x1f\x8b"):
                        raw.seek(0)
                        self.content = gzip.GzipFile(fileobj=raw).read(LARGEST + 1)
                        self.head, size = self.content[:HEAD], len(self.content)
        except Exception as error:  # no permission, a damaged archive: OSError, EOFError or zlib.error
            why = f"({first_line(error)}). Check its permissions, or download it again."
            raise DataError(f"{name} cannot be read {why}") from None
        if size > LARGEST:
            raise DataError(f"{name} {TOO_LARGE}")

    def stream(self) -> BinaryIO:
        """The bytes."""
        return io.BytesIO(self.content) if isinstance(self.content, bytes) else self.content.open("rb")

    def text(self, newline: str | None = None) -> TextIO:
        """The decoded text. Bytes that do not fit the encoding become lone surrogates, which cost only their row."""
        errors = "replace" if self.encoding.startswith("utf-16") else "surrogateescape"
        return io.TextIOWrapper(self.stream(), encoding=self.encoding, errors=errors, newline=newline)

    @cached_property
    def encoding(self) -> str:
        """UTF-8 (with or without byte order mark), UTF-16, or Latin-1 in the variant that Windows writes.

        charset_normalizer takes short German text for Icelandic, and a file for Latin-2 because of one wrong byte.

        Raises:
            DataError: the file is binary.
        """
        what = next((what for magic, what in NOT_DATA.items() if self.head.startswith(magic)), "")
        encoding = next((name for mark, name in MARKS.items() if self.head.startswith(mark)), "")
        controls = len(re.findall(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f]", self.head))
        zeros = self.head[::2].count(0), self.head[1::2].count(0)
        if not encoding and max(zeros) > 0.15 * len(self.head) and sum(zeros) < 0.6 * len(self.head):
            encoding = "utf-16-le" if zeros[1] > zeros[0] else "utf-16-be"  # of ASCII, every other byte is zero
            controls -= max(zeros)
        if what or (encoding != "utf-16" and controls > max(3, 0.03 * len(self.head))):
            what = what or "a binary file"
            raise DataError(f"{self.name} is {what}. Data files are JSON, JSON lines, CSV, TSV or Parquet.")
        return encoding or self._utf8_or_latin1()

    def _utf8_or_latin1(self) -> str:
        """UTF-8 unless most of what is not ASCII cannot be UTF-8: then one wrong byte does not garble a whole file."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="surrogateescape")
        foreign = wrong = undefined = 0
        with self.stream() as raw:
            while chunk := raw.read(CHUNK):
                text = decoder.decode(chunk)
                foreign += len(re.findall(r"[^\x00-\x7f]", text))
                wrong += len(re.findall("[\udc80-\udcff]", text))  # how Python shows a byte that is no UTF-8
                undefined += len(re.findall(rb"[\x81\x8d\x8f\x90\x9d]", chunk))  # in Windows-1252
        if wrong * 2 <= foreign:
            return "utf-8"
        return "latin-1" if undefined else "cp1252"


def kind_of(name: str) -> str | None:
    """The kind of data that a file name promises, None if it promises none. `.gz` may follow."""
    return KINDS.get(Path(name.lower().removesuffix(".gz")).suffix)


def parse(file: DataFile) -> Iterator[Record]:
    """Every record of one file, in order.

    Raises:
        DataError: the file as a whole is not what it seems: empty, binary, too large, or of no known format.
    """
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
        for number, line in enumerate(text, start=1):
            if not (line := line.strip().strip("\ufeff")):
                continue
            try:
                yield Record(json.loads(line), file.name, number)
            except (ValueError, RecursionError) as error:
                reason = f"not readable as JSON: {_json_error(error, number)}"
                yield Record(line, file.name, number, Issue("broken line", reason))


def values(file: DataFile) -> Iterator[Record]:
    """A JSON array, or objects one after the other; one object that only wraps rows ({"data": [...]}) is unwrapped."""
    with file.text() as stream:
        text = stream.read()
    if text.lstrip(BLANK)[:1] == "[":
        yield from _values(text, file.name, array=True)
        return
    records = list(_values(text, file.name, array=False))
    rows = _unwrap(records[0].value) if len(records) == 1 and isinstance(records[0].value, dict) else []
    yield from (Record(row, file.name, number) for number, row in enumerate(rows, start=1)) if rows else records


def _values(text: str, name: str, array: bool) -> Iterator[Record]:
    """JSON values one after the other, with the line on which each begins; after a broken one, all the rest."""
    decoder, between = json.JSONDecoder(), BLANK + "," * array
    position = text.index("[") + 1 if array else 0
    line, counted = 1, 0
    while True:
        while text[position : position + 1] in between and position < len(text):
            position += 1
        line, counted = line + text.count("\n", counted, position), position
        following = text[position : position + 1]
        if following == "" and not array:
            return
        if following == "]" and array:
            if rest := text[position + 1 :].strip(between):
                issue = Issue("unreadable rest", f"line {line}: more text after the array's end")
                yield Record(rest, name, line, issue)
            return
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            reason = _json_error(error) if following else f"line {line}: the file ends before the array does"
            issue = Issue("unreadable rest", f"not readable as JSON from here on ({reason})")
            yield Record(text[position:], name, line, issue)
            return
        yield Record(value, name, line)


def _json_error(error: Exception, line: int = 0) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} (line {line or error.lineno}, column {error.colno})"
    return "nested too deeply, or a number too long" + (f" (line {line})" if line else "")


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _unwrap(value: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows in {"data": [row, ...]}, in {"column": [cell, ...], ...} or in pandas' {"column": {"0": cell}, ...}."""
    lists = [part for part in value.values() if isinstance(part, list) and all(isinstance(row, dict) for row in part)]
    rows = [row for part in lists for row in part]
    if rows:
        is_chat = all({"role", "content"} <= row.keys() or {"from", "value"} <= row.keys() for row in rows)
        return [] if is_chat else rows
    columns = [list(cells.values()) if isinstance(cells, dict) else cells for cells in value.values()]
    if columns and all(isinstance(cells, list) and cells and len(cells) == len(columns[0]) for cells in columns):
        return [dict(zip(value, row)) for row in zip(*columns)]
    return []


def table(file: DataFile) -> Iterator[Record]:
    """CSV or TSV: quotes, separators and line breaks inside quoted fields stay exactly as they are.

    `strict` makes the csv module complain about a stray quote instead of swallowing the rest of the file.
    """
    delimiter = "\t" if file.kind == "tsv" else _delimiter(file)
    with file.text(newline="") as text:
        rows = csv.reader(text, delimiter=delimiter, strict=True)
        header: list[str] = []
        while True:
            line = rows.line_num + 1
            try:
                row = next(rows, None)
            except (csv.Error, ValueError) as error:
                code, reason = "broken line", f"{error} (line {line})"
                if "unexpected end of data" in reason:
                    code, reason = "unreadable rest", f"a quote opened in line {line} is never closed"
                yield Record(f"line {line}", file.name, line, Issue(code, reason))
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


def _delimiter(file: DataFile) -> str:
    """The separator that gives the header the most columns: comma, or what Excel writes in other countries."""
    with file.text() as text:
        header = next((line for line in text if line.strip()), "")
    return max(",;\t|", key=header.count)


def refuse_twice(names: list[str], where: str) -> None:
    """Two columns of one name would hide each other."""
    for column, name in enumerate(names, start=1):
        if name and names.index(name) + 1 < column:
            columns = f"columns {names.index(name) + 1} and {column}"
            raise DataError(f"{where}: {columns} are both named {name!r}. Rename one of them.")


def parquet(file: DataFile) -> Iterator[Record]:
    """Parquet, a thousand rows at a time. `line` is the number of the row."""
    from pyarrow.parquet import ParquetFile

    try:
        source = ParquetFile(file.stream())
        names = list(source.schema_arrow.names)
    except Exception as error:  # pyarrow may fail in many ways on a damaged file
        raise DataError(f"{file.name} is not readable as Parquet ({first_line(error)}). Download it again.") from None
    refuse_twice(names, file.name)
    done = 0
    try:
        for batch in source.iter_batches(batch_size=1000):
            for row in batch.to_pylist():
                done += 1
                yield Record(row, file.name, done)
    except Exception as error:
        reason = f"row {done + 1} onwards is damaged ({first_line(error)})"
        yield Record(None, file.name, done + 1, Issue("unreadable rest", reason))

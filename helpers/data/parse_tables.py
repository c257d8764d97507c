"""CSV, TSV and Parquet in, records out, streamed."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator

from helpers.data.faults import DataError, Problem
from helpers.data.files import SNIFFED, DataFile, Record, first_line

csv.field_size_limit(2**31 - 1)  # a field may be a whole article; the default stops at 131,072 characters


def table(file: DataFile) -> Iterator[Record]:
    """CSV or TSV: quotes, separators and line breaks inside quoted fields stay exactly as they are.

    `strict` makes the csv module complain about a stray quote instead of swallowing the rest of the file.
    """
    delimiter = "\t" if file.kind == "tsv" else _delimiter(file)
    with file.text(newline="") as text:
        rows = csv.reader(text, delimiter=delimiter, strict=True)
        header: list[str] | None = None
        while True:
            line = rows.line_num + 1
            try:
                row = next(rows, None)
            except (csv.Error, ValueError) as error:
                unclosed = "unexpected end of data" in str(error)
                reason = f"a quote opened in line {line} is never closed" if unclosed else f"{error} (line {line})"
                yield Record(
                    f"line {line}", file.name, line, Problem("unreadable rest" if unclosed else "broken line", reason)
                )
                continue
            if row is None:
                return
            if not row:
                continue
            if header is None:
                header = _header(row, file.name, line)
            elif len(row) != len(header):
                reason = f"{len(row)} fields, but the header has {len(header)}; a field that holds {delimiter!r} needs quotes around it"
                yield Record(
                    dict(zip(header, row)) | {"(fields)": row}, file.name, line, Problem("broken line", reason)
                )
            else:
                yield Record(dict(zip(header, row)), file.name, line)


def _delimiter(file: DataFile) -> str:
    """The separator that gives the header the most columns: comma, or what Excel writes in other countries."""
    with file.text(newline="") as text:
        head = text.read(SNIFFED)
    counts = {}
    for delimiter in (",", ";", "\t", "|"):
        try:
            counts[delimiter] = len(next(iter(csv.reader(io.StringIO(head, newline=""), delimiter=delimiter)), []))
        except csv.Error:
            counts[delimiter] = 0
    return max(counts, key=lambda delimiter: counts[delimiter])


def _header(row: list[str], name: str, line: int) -> list[str]:
    names = [cell.strip().lstrip("\ufeff") for cell in row]
    for column, cell in enumerate(names, start=1):
        if cell and cell in names[: column - 1]:
            first = names.index(cell) + 1
            raise DataError(
                f"{name}, line {line}: columns {first} and {column} are both named {cell!r}. Rename one of them."
            )
    return names


def parquet(file: DataFile) -> Iterator[Record]:
    """Parquet, a thousand rows at a time. `line` is the number of the row."""
    from pyarrow.parquet import ParquetFile

    try:
        source = ParquetFile(file.seekable())
        names = list(source.schema_arrow.names)
    except Exception as error:  # pyarrow may fail in many ways on a damaged file
        raise DataError(
            f"{file.name} is not readable as Parquet ({first_line(error)}). Write or download it again."
        ) from None
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{file.name}: two columns are named {twice!r}. Rename one of them.")
    done = 0
    try:
        for batch in source.iter_batches(batch_size=1000):
            rows = batch.to_pylist()
            for row in rows:
                done += 1
                yield Record(row, file.name, done)
    except Exception as error:
        yield Record(
            None,
            file.name,
            done + 1,
            Problem("unreadable rest", f"row {done + 1} onwards is damaged ({first_line(error)})"),
        )

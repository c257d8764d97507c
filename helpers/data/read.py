"""One data file as a stream of bytes or text: size limit, gzip, encoding, and a refusal of what is no data file at all.

with DataFile("examples.jsonl.gz", Path("examples.jsonl.gz")).text() as stream: ...

JSON in, records out: lines, arrays, objects one after the other, and objects that wrap a table.

A broken line costs only itself. In an array, nobody can say where the next element begins after a broken one, so the rest is one record
with a problem.

CSV, TSV and Parquet in, records out, streamed.

Bytes in, records out: JSON, JSON lines, CSV, TSV and Parquet, in any common encoding, plain or gzipped.

    for record in parse(DataFile("examples.csv", path)):
        record.value, record.line, record.problem

Parsing itself is the standard library's (json, csv, gzip) and pyarrow's; here we choose the parser, keep the line numbers and make
sure that what cannot be parsed becomes a record with a `Problem` instead of an exception. Nothing is read whole except a JSON array.

Any source in, records out: a file, a folder, a data set on the Hub, a table in memory, an upload in Colab.

    records = read("my_examples.csv")              # or "my_folder/", "owner/dataset", a DataFrame, upload()
    for record in records: record.value, record.file, record.line, record.problem

The source is recognized here, its files are parsed by `helpers.data.read`.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TextIO

from helpers.data.issues import DataError, Problem

LARGEST = 2 * 2**30  # bytes, also after unpacking: far more text than one card learns in a week
HEAD, CHUNK = 65_536, 1 << 20  # bytes looked at first, and read at a time
SNIFFED = 65_536  # characters looked at to tell formats apart
SUFFIXES = {
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".parquet": "parquet",
    ".txt": "",
}
NOT_DATA = {
    b"PK\x03\x04": "an Excel file or a zip archive: save the sheet as CSV, or unpack the archive",
    b"%PDF": "a PDF: copy its questions and answers into a CSV or JSON lines file",
    b"\xd0\xcf\x11\xe0": "an old Office document: save it as CSV",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
    b"\x28\xb5\x2f\xfd": "packed with zstd: unpack it",
    b"BZh": "packed with bzip2: unpack it",
    b"\xfd7zXZ": "packed with xz: unpack it",
    b"ARROW1": "an Arrow file: save it as Parquet",
    b"\x80\x04\x95": "a pickle, which can run code: save it as Parquet",
}
ESCAPED = re.compile("[\udc80-\udcff]")  # how Python shows a byte that is no UTF-8


class Record(NamedTuple):
    """One row as the parser gave it, and where it stands. `value` is a dict, or the raw text where `problem` says why it is none."""

    value: Any
    file: str
    line: int
    problem: Problem | None = None


@dataclass
class DataFile:
    """A file of examples: a path, or the bytes of an upload."""

    name: str
    content: Path | bytes

    def __post_init__(self) -> None:
        if self.size > LARGEST:
            raise DataError(
                f"{self.name} has {self.size / 2**30:.1f} GiB; the limit is {LARGEST / 2**30:.0f} GiB. "
                "Take the first 100,000 examples: for fine-tuning, few good ones beat many."
            )

    @property
    def size(self) -> int:
        try:
            return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size
        except OSError as error:
            raise _unreadable(self.name, error) from None

    @property
    def kind(self) -> str:
        """What the name says: "json", "jsonl", "csv", "tsv", "parquet", or "" if it says nothing."""
        return kind_of(self.name) or ""

    def open(self) -> BinaryIO:
        """The bytes, unpacked if they are gzipped, ending with a `DataError` beyond the size limit."""
        try:
            raw = io.BytesIO(self.content) if isinstance(self.content, bytes) else self.content.open("rb")
            packed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
        except OSError as error:
            raise _unreadable(self.name, error) from None
        return io.BufferedReader(_Limited(gzip.GzipFile(fileobj=raw) if packed else raw, self.name), CHUNK)

    @cached_property
    def head(self) -> bytes:
        with self.open() as stream:
            return stream.read(HEAD)

    def is_parquet(self) -> bool:
        return self.head[:4] == b"PAR1"

    def seekable(self) -> BinaryIO:
        """For Parquet, which is read from its end."""
        if isinstance(self.content, Path):
            with self.content.open("rb") as raw:
                if raw.read(2) != b"\x1f\x8b":
                    return self.content.open("rb")
        with self.open() as stream:
            return io.BytesIO(stream.read())

    def text(self, newline: str | None = None) -> TextIO:
        """The decoded text. Bytes that do not fit the encoding come out as lone surrogates, so that only their row is lost."""
        errors = "replace" if self.encoding.startswith("utf-16") else "surrogateescape"
        return io.TextIOWrapper(self.open(), encoding=self.encoding, errors=errors, newline=newline)

    @cached_property
    def encoding(self) -> str:
        """UTF-8 (with or without byte order mark), UTF-16, or Latin-1 in the variant that Windows writes.

        Raises:
            DataError: the file is binary.
        """
        self._refuse_binary()
        for mark, name in (
            (codecs.BOM_UTF8, "utf-8-sig"),
            (codecs.BOM_UTF16_LE, "utf-16"),
            (codecs.BOM_UTF16_BE, "utf-16"),
        ):
            if self.head.startswith(mark):
                return name
        zeros = self.head[1::2].count(0), self.head[::2].count(0)
        if max(zeros) > 0.3 * len(self.head) / 2:
            return "utf-16-le" if zeros[0] > zeros[1] else "utf-16-be"
        return self._utf8_or_latin1()

    def _utf8_or_latin1(self) -> str:
        """UTF-8 unless most of what is not ASCII cannot be UTF-8: then one wrong byte does not garble a whole file."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="surrogateescape")
        foreign = wrong = 0
        undefined = False  # in Windows-1252
        with self.open() as stream:
            while chunk := stream.read(CHUNK):
                if chunk.isascii():
                    continue
                text = decoder.decode(chunk)
                foreign += len(text) - len(text.encode("ascii", "ignore"))
                wrong += len(ESCAPED.findall(text))
                undefined = undefined or bool(re.search(rb"[\x81\x8d\x8f\x90\x9d]", chunk))
        if wrong * 2 <= foreign:
            return "utf-8"
        return "latin-1" if undefined else "cp1252"

    def _refuse_binary(self) -> None:
        what = next((what for magic, what in NOT_DATA.items() if self.head.startswith(magic)), "")
        utf16 = self.head[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        controls = len(re.findall(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f]", self.head))
        zeros = (
            max(self.head[1::2].count(0), self.head[::2].count(0)) if self.head.count(0) < 0.6 * len(self.head) else 0
        )
        if zeros > 0.3 * len(self.head) / 2:  # text in UTF-16: every other byte is zero
            controls -= zeros
        if what or (not utf16 and controls > max(3, 0.03 * len(self.head))):
            raise DataError(
                f"{self.name} is {what or 'a binary file'}. Data files are JSON, JSON lines, CSV, TSV or Parquet."
            )


class _Limited(io.RawIOBase):
    """Bytes that may come from an archive: stops at the size limit, and says in one sentence what a damaged archive is."""

    def __init__(self, raw: BinaryIO, name: str) -> None:
        self.raw, self.name, self.count = raw, name, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray) -> int:
        try:
            data = self.raw.read(len(buffer))
        except Exception as error:  # a damaged archive: OSError, EOFError or zlib.error
            raise _unreadable(self.name, error) from None
        self.count += len(data)
        if self.count > LARGEST:
            raise DataError(
                f"{self.name} unpacks to more than {LARGEST / 2**30:.0f} GiB. Take the first 100,000 examples."
            )
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self.raw.close()
        super().close()


def kind_of(name: str) -> str | None:
    """The kind of data that a file name promises, None if it promises none. `.gz` may follow."""
    return SUFFIXES.get(Path(name.lower().removesuffix(".gz")).suffix)


def _unreadable(name: str, error: Exception) -> DataError:
    return DataError(f"{name} cannot be read ({first_line(error)}). Check its permissions, or download it again.")


def first_line(error: BaseException) -> str:
    """The first line of what an exception says, for a message of one sentence."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


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


HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(/[\w./-]+)?")
HELD_OUT = re.compile(
    r"(?:^|[^a-z])(validation|valid|val|dev|test|eval)(?:[^a-z]|$)"
)  # in the name of a file or a split


def read(source: Any) -> Iterator[Record]:
    """Every record of a source, one after the other. See `name_of` for how a source is called in messages.

    Args:
        source: path of a file or folder, id of a data set on the Hub ("owner/name"), DataFrame, `datasets.Dataset`, list of dicts, or
            what `upload()` returns.

    Raises:
        DataError: there is no such source, or nothing in it can be read.
    """
    if isinstance(source, (str, Path)):
        for file in _files(source):
            yield from parse(file)
    elif isinstance(source, Mapping) and source and all(isinstance(content, bytes) for content in source.values()):
        for name, content in source.items():
            yield from parse(DataFile(str(name), bytes(content)))
    elif isinstance(source, Mapping) and source and all(hasattr(part, "column_names") for part in source.values()):
        for name, part in source.items():  # a DatasetDict
            yield from _rows(part, str(name))
    elif isinstance(source, (list, tuple)):
        yield from _rows(source, name_of(source))
    elif hasattr(source, "itertuples"):
        yield from _table_rows(source)
    elif hasattr(source, "column_names"):
        yield from _rows(source, name_of(source))
    else:
        raise DataError(
            f"A {type(source).__name__} is no source of examples. Give a path, a Hub id, a DataFrame or a list of dicts."
        )


def name_of(source: Any) -> str:
    """What to call a source in a message: its path, or what it is."""
    if isinstance(source, (str, Path)):
        return str(source)
    if isinstance(source, Mapping):
        return ", ".join(map(str, source)) or "the upload"
    return {"list": "the list", "tuple": "the list", "DataFrame": "the DataFrame"}.get(
        type(source).__name__, "the dataset"
    )


def is_held_out(name: str) -> bool:
    """Does a file or split name say that it is for validation or testing?"""
    return HELD_OUT.search(Path(name).name.lower()) is not None


def upload() -> dict[str, bytes]:
    """Colab's upload button: name -> content of what you chose, ready for `load_examples` and `check_examples`.

    Raises:
        DataError: this is not Colab, or nothing was chosen.
    """
    try:
        from google.colab import files
    except ImportError:
        raise DataError("upload() works in Colab only. Elsewhere, give the path of your file.") from None
    chosen = files.upload()
    if not chosen:
        raise DataError("Nothing was uploaded. Run the cell again and choose a file.")
    return chosen


# ------------------------------------------------------------------------------------------------ files


def _files(source: str | Path) -> list[DataFile]:
    """The data files behind a path or an id."""
    path, text = Path(source), str(source)
    try:
        if path.is_file():
            return [DataFile(text, path)]
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if _is_data(file.relative_to(path)) and file.is_file())
            if not found:
                raise DataError(
                    f"No data file in the folder {os.path.abspath(path)}. Put .jsonl, .json, .csv, .tsv or .parquet files there."
                )
            return [DataFile(str(file), file) for file in found]
        exists = path.exists()
    except (OSError, ValueError) as error:  # no permission, a name that is too long, a NUL in it
        raise DataError(
            f"{text!r:.200} cannot be opened ({first_line(error)}). Check the path and its permissions."
        ) from None
    if (
        not exists
        and isinstance(source, str)
        and HUB_ID.fullmatch(text.removeprefix("hf://datasets/"))
        and kind_of(text) is None
    ):
        return _from_hub(text.removeprefix("hf://datasets/"))
    raise DataError(f"No data file at {os.path.abspath(path)}. Check the path, or copy your file there.")


def _is_data(file: Path) -> bool:
    hidden = any(part.startswith((".", "_")) for part in file.parts)
    return (
        not hidden
        and kind_of(file.name) is not None
        and file.suffix.lower() != ".txt"
        and file.name != "rejected.jsonl"
    )


def _from_hub(text: str) -> list[DataFile]:
    """The training files of a data set on the Hub, downloaded to its cache. Nothing that the data set contains is ever run."""
    from huggingface_hub import HfApi, hf_hub_download

    owner, name, *folder = text.split("/")
    repo, inside = f"{owner}/{name}", "/".join(folder)
    try:
        siblings = HfApi().dataset_info(repo, files_metadata=True).siblings or []
        sizes = {file.rfilename: file.size or 0 for file in siblings if _is_data(Path(file.rfilename))}
    except Exception as error:  # no network, no such data set, gated: whatever the Hub says is passed on
        raise DataError(
            f"No file at {os.path.abspath(text)}, and no data set {repo!r} on the Hub ({first_line(error)}). "
            "Check the spelling and the network; a gated data set needs `hf auth login`."
        ) from None
    chosen = choose_hub_files(repo, [file for file in sizes if file.startswith(inside)])
    total = sum(sizes[file] for file in chosen)
    if total > LARGEST:
        raise DataError(
            f"{repo}: its data files have {total / 2**30:.1f} GiB; the limit is 2 GiB. Name one of its folders: {repo}/folder."
        )
    try:
        return [DataFile(f"{repo}/{file}", Path(hf_hub_download(repo, file, repo_type="dataset"))) for file in chosen]
    except DataError:
        raise
    except Exception as error:
        raise DataError(
            f"{repo}: the download failed ({first_line(error)}). Check the network, then run this again."
        ) from None


def choose_hub_files(repo: str, files: list[str]) -> list[str]:
    """Which files of a data set are its training data: of one configuration, without validation and test parts."""
    if not files:
        raise DataError(
            f"{repo} has no JSON, CSV, TSV or Parquet file. Choose another data set, or download it and convert it."
        )
    train = [file for file in files if not is_held_out(file)] or files
    folders = sorted({str(Path(file).parent.as_posix()) for file in train} - {"."})
    if len(folders) > 1 and not any("/" not in file for file in train):
        raise DataError(f"{repo} has several parts: {', '.join(folders[:8])}. Choose one: {repo}/{folders[0]}.")
    return sorted(train)


# ------------------------------------------------------------------------------------------------ tables in memory


def _rows(rows: Any, name: str) -> Iterator[Record]:
    for number, row in enumerate(rows, start=1):
        yield Record(row, name, number)


def _table_rows(table: Any) -> Iterator[Record]:
    """Rows of a pandas DataFrame; its missing values (NaN, NaT, NA) become None. `line` is the number of the row."""
    names = [str(name) for name in table.columns]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"The DataFrame: two columns are named {twice!r}. Rename one of them.")
    for number, row in enumerate(table.itertuples(index=False, name=None), start=1):
        yield Record(
            {name: None if _is_missing(value) else value for name, value in zip(names, row)}, "the DataFrame", number
        )


def _is_missing(value: Any) -> bool:
    return type(value).__name__ in ("NAType", "NaTType") or (isinstance(value, float) and value != value)


__all__ = ["DataError", "Problem", "Record", "choose_hub_files", "is_held_out", "name_of", "read", "upload"]

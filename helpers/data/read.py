"""Any source in, records out: a file, a folder, a data set on the Hub, a table in memory.

for record in read("my_examples.csv"):         # or "my_folder/", "owner/dataset", a DataFrame, {"name": content}
    record.value, record.file, record.line, record.issue
"""

from __future__ import annotations

import codecs
import gzip
import io
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, TextIO

from helpers.data.issues import DataError, first_line
from helpers.data.parse import BATCH, HEAD, MOST_ROWS, Record, parse, refuse_large, refuse_twice

CHUNK = 1 << 20  # bytes read at a time
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
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(/[\w./-]+)?")
PART = re.compile(r"(?:^|[^a-z])(?:(train|training)|(validation|valid|val|dev)|test|eval)(?:[^a-z]|$)")


def read(source: Any) -> Iterator[Record]:
    """Every record of a source, one after the other. Raises DataError if there is none, it cannot be read, or is too large.

    A source is the path of a file or folder, the id of a data set on the Hub ("owner/name"), a DataFrame, a `datasets.Dataset`,
    a list of dicts, or uploaded files as {name: bytes}.
    """
    for number, record in enumerate(_records(source), start=1):
        if number > MOST_ROWS:
            refuse_large(name_of(source), rows=number)
        yield record


def _records(source: Any) -> Iterator[Record]:
    parts = dict(source) if isinstance(source, Mapping) else {}
    if isinstance(source, (str, Path)) or (parts and all(isinstance(content, bytes) for content in parts.values())):
        yield from _parsed(list(parts.items()) or _files(source), name_of(source))
    elif parts and all(hasattr(part, "column_names") for part in parts.values()):  # a DatasetDict
        for name, part in parts.items():
            yield from _rows(part, str(name))
    elif hasattr(source, "itertuples"):
        refuse_twice([str(name) for name in source.columns], "The DataFrame")
        yield from _rows(_of_table(source), name_of(source))
    elif isinstance(source, (list, tuple)) or hasattr(source, "column_names"):
        yield from _rows(source, name_of(source))
    else:
        raise DataError(f"{type(source).__name__} is no source of examples. Give a path, a Hub id or a DataFrame.")


def name_of(source: Any) -> str:
    """What to call a source in a message: its path, or what it is."""
    if isinstance(source, Mapping):
        return ", ".join(map(str, source))
    return str(source) if isinstance(source, (str, Path)) else f"the {type(source).__name__}"


@lru_cache(maxsize=4096)
def part_of(name: str) -> str:
    """What the name of a file, of its folder or of a split says that its rows are for; "" if it says nothing."""
    found = next(filter(None, map(PART.search, reversed(Path(name.lower()).parts[-2:]))), None)
    return "" if not found else "train" if found[1] else "validation" if found[2] else "test"


def _rows(rows: Iterable[Any], name: str) -> Iterator[Record]:
    for number, row in enumerate(rows, start=1):
        yield Record(row, name, number, part=name)


def _of_table(table: Any) -> Iterator[dict[str, Any]]:
    """The rows of a DataFrame; NaN, NaT and NA are null."""
    for start in range(0, len(table), BATCH):
        some = table.iloc[start : start + BATCH].rename(columns=str)
        yield from some.astype(object).where(some.notna().to_numpy(), None).to_dict("records")


def _parsed(files: list[tuple[str, Any]], source: str) -> Iterator[Record]:
    size = 0
    for name, content in files:
        try:
            file = DataFile(name := str(name), content)
            size += file.size
            refuse_large(source, size)
            inside = "/".join(Path(name).parts[len(Path(source).parts) :]) or Path(name).name
            yield from (record._replace(part=f"{inside}/{record.part}") for record in parse(file))
        except (OSError, EOFError, zlib.error, MemoryError) as error:  # no permission, a damaged archive or disk
            why = f"({first_line(error)}). Check its permissions, or download it again."
            raise DataError(f"{name} cannot be read {why}") from None


def _files(source: str | Path) -> list[tuple[str, Any]]:
    """(name, path) of the data files behind a path or a Hub id."""
    path, text = Path(source), str(source)
    hub_id = text.removeprefix("hf://datasets/")
    try:
        found = sorted(file for file in path.rglob("*") if _is_data(file.relative_to(path)) and file.is_file())
        found = [path] if path.is_file() else found
    except (OSError, ValueError) as error:  # no permission, a name that is too long, a NUL in it
        raise DataError(f"{text!r:.200} cannot be opened ({first_line(error)}). Check the path.") from None
    if found:
        return [(str(file), file) for file in found]
    if path.is_dir():
        where = f"No data file in the folder {os.path.abspath(path)}."
        raise DataError(f"{where} Put .jsonl, .csv or .parquet files there.")
    if isinstance(source, str) and HUB_ID.fullmatch(hub_id) and kind_of(text) is None:
        return _from_hub(hub_id)
    raise DataError(f"No data file at {os.path.abspath(path)}. Check the path, or copy your file there.")


def _is_data(file: Path) -> bool:
    hidden = any(part.startswith((".", "_")) for part in file.parts)
    return not hidden and bool(kind_of(file.name)) and file.name != "rejected.jsonl"


def _from_hub(hub_id: str) -> list[tuple[str, Any]]:
    """The training files of a data set on the Hub, downloaded to its cache. Nothing that it contains is ever run.

    `datasets.load_dataset` guesses types (an answer "007" becomes the number 7), and refuses all for one broken line.
    """
    from huggingface_hub import HfApi, hf_hub_download

    owner, name, *folder = hub_id.split("/")
    repo = f"{owner}/{name}"
    try:
        siblings = HfApi().dataset_info(repo, files_metadata=True).siblings or []
        sizes = {file.rfilename: file.size or 0 for file in siblings if _is_data(Path(file.rfilename))}
        chosen = choose_hub_files(repo, [file for file in sizes if file.startswith("/".join(folder))])
        refuse_large(f"{repo} (its folders can be named: {repo}/folder)", sum(sizes[file] for file in chosen))
        return [(f"{repo}/{file}", Path(hf_hub_download(repo, file, repo_type="dataset"))) for file in chosen]
    except DataError:
        raise
    except Exception as error:  # no network, no such data set, gated: whatever the Hub says is passed on
        raise DataError(
            f"No file at {os.path.abspath(hub_id)}, and no data set {repo!r} on the Hub ({first_line(error)}). "
            "Check the spelling and the network; a gated data set needs `hf auth login`."
        ) from None


def choose_hub_files(repo: str, files: list[str]) -> list[str]:
    """Which files of a data set are its training data: of one configuration, without validation and test parts."""
    if not files:
        raise DataError(f"{repo} has no JSON, CSV, TSV or Parquet file. Choose another data set.")
    train = [file for file in files if part_of(file) in ("", "train")] or files
    folders = sorted({Path(file).parent.as_posix() for file in train})
    if len(folders) > 1 and "." not in folders:
        raise DataError(f"{repo} has several parts: {', '.join(folders[:8])}. Choose one: {repo}/{folders[0]}.")
    return sorted(train)


def kind_of(name: str) -> str | None:
    """The kind of data that a file name promises, None if it promises none. `.gz` may follow."""
    return KINDS.get(Path(name.lower().removesuffix(".gz")).suffix)


class DataFile:
    """A file of examples: a path, or the bytes of an upload. `size` is in bytes, unpacked. Raises DataError if it is too large."""

    def __init__(self, name: str, content: Path | bytes) -> None:
        self.name, self.content, self.kind, self.packed = name, content, kind_of(name) or "", False
        self.size = len(content) if isinstance(content, bytes) else content.stat().st_size
        refuse_large(name, self.size)
        with self.stream() as raw:
            self.packed = raw.read(2) == b"\x1f\x8b"
        with self.stream() as raw:
            self.head = raw.read(HEAD)
            while self.packed and raw.read(CHUNK):
                self.size = raw.tell()
                refuse_large(name, self.size)

    def stream(self) -> Any:
        """The bytes, unpacked: a binary file to read from."""
        content = io.BytesIO(self.content) if isinstance(self.content, bytes) else self.content
        if self.packed:
            return gzip.open(content)
        return content.open("rb") if isinstance(content, Path) else content

    def text(self, newline: str | None = None) -> TextIO:
        """The decoded text. Bytes that do not fit the encoding become lone surrogates, which cost only their row."""
        errors = "replace" if self.encoding.startswith("utf-16") else "surrogateescape"
        return io.TextIOWrapper(self.stream(), encoding=self.encoding, errors=errors, newline=newline)

    @cached_property
    def encoding(self) -> str:
        """UTF-8 (with or without byte order mark), UTF-16, or Latin-1 in the variant that Windows writes. DataError if it is binary.

        charset_normalizer takes short German text for Icelandic, and a file for Latin-2 because of one wrong byte.
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
                if text.isascii():
                    continue
                foreign += len(re.findall(r"[^\x00-\x7f]", text))
                wrong += len(re.findall("[\udc80-\udcff]", text))  # how Python shows a byte that is no UTF-8
                undefined += len(re.findall(rb"[\x81\x8d\x8f\x90\x9d]", chunk))  # in Windows-1252
        if wrong * 2 <= foreign:
            return "utf-8"
        return "latin-1" if undefined else "cp1252"

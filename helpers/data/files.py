"""One data file as a stream of bytes or text: size limit, gzip, encoding, and a refusal of what is no data file at all.

with DataFile("examples.jsonl.gz", Path("examples.jsonl.gz")).text() as stream: ...
"""

from __future__ import annotations

import codecs
import gzip
import io
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TextIO

from helpers.data.faults import DataError, Problem

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

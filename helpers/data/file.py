"""The bytes behind a name, a path or an upload, gzipped or not, in any common encoding; and how much of them may be read."""

from __future__ import annotations

import codecs
import gzip
import io
import re
from functools import cached_property
from pathlib import Path
from typing import Any, TextIO

import psutil

from helpers.data.issues import DataError

LARGEST = 2 * 2**30  # bytes, also after unpacking: far more text than one card learns in a week
MOST_ROWS = 1_000_000  # the same in rows
COPIES, COPIES_WHOLE = 4, 8  # bytes of memory that a byte of data takes; where all of it is one value
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


def kind_of(name: str) -> str | None:
    """The kind of data that a file name promises, None if it promises none. `.gz` may follow."""
    return KINDS.get(Path(name.lower().removesuffix(".gz")).suffix)


def refuse_large(name: str, size: int = 0, rows: int = 0, copies: int = COPIES) -> None:
    """Raise `DataError` where so many bytes or rows are more than a card needs, or than fit into free memory."""
    most = min(LARGEST, psutil.virtual_memory().available // copies)
    if size > most or rows > MOST_ROWS:
        what = f"{MOST_ROWS:,} rows" if size <= most else f"the {most / 2**30:.1f} GiB that can be read here"
        fix = "Take the first 100,000 examples, as JSON lines: for fine-tuning, few good ones beat many."
        raise DataError(f"{name} has more than {what}. {fix}")


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

"""Any source in, records out: a file, a folder, a data set on the Hub, a table in memory.

for record in read("my_examples.csv"):         # or "my_folder/", "owner/dataset", a DataFrame, {"name": content}
    record.value, record.file, record.line, record.issue
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from helpers.data.file import MOST_ROWS, DataFile, kind_of, refuse_large
from helpers.data.issues import DataError, first_line
from helpers.data.parse import BATCH, Record, parse, refuse_twice

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
        yield Record(row, name, number)


def _of_table(table: Any) -> Iterator[dict[str, Any]]:
    """The rows of a DataFrame; NaN, NaT and NA are null."""
    for start in range(0, len(table), BATCH):
        some = table.iloc[start : start + BATCH].rename(columns=str)
        yield from some.astype(object).where(some.notna().to_numpy(), None).to_dict("records")


def _parsed(files: list[tuple[str, Any]], source: str) -> Iterator[Record]:
    size = 0
    for name, content in files:
        try:
            file = DataFile(str(name), content)
            size += file.size
            refuse_large(source, size)
            yield from parse(file)
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

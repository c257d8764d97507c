"""Any source in, records out: a file, a folder, a data set on the Hub, a table in memory.

    for record in read("my_examples.csv"):         # or "my_folder/", "owner/dataset", a DataFrame, {"name": content}
        record.value, record.file, record.line, record.issue

The source is recognized here; its files are parsed by `helpers.data.parse`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from helpers.data.issues import DataError, first_line
from helpers.data.parse import LARGEST, TOO_LARGE, DataFile, Record, kind_of, parse, refuse_twice

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(/[\w./-]+)?")
HELD_OUT = re.compile(r"(?:^|[^a-z])(validation|valid|val|dev|test|eval)(?:[^a-z]|$)")  # in the name of a file or split


def read(source: Any) -> Iterator[Record]:
    """Every record of a source, one after the other.

    Args:
        source: path of a file or folder, id of a data set on the Hub ("owner/name"), DataFrame, `datasets.Dataset`,
            list of dicts, or uploaded files as {name: bytes}.

    Raises:
        DataError: there is no such source, or nothing in it can be read.
    """
    parts = dict(source) if isinstance(source, Mapping) else {}
    if isinstance(source, (str, Path)) or (parts and all(isinstance(content, bytes) for content in parts.values())):
        for name, content in parts.items() or _files(source):
            yield from parse(DataFile(str(name), content))
    elif parts and all(hasattr(part, "column_names") for part in parts.values()):  # a DatasetDict
        for name, part in parts.items():
            yield from _rows(part, str(name))
    elif hasattr(source, "itertuples"):
        refuse_twice([str(name) for name in source.columns], "The DataFrame")
        nulled = source.rename(columns=str).astype(object).where(source.notna().to_numpy(), None)  # NaN, NaT, NA
        yield from _rows(nulled.to_dict("records"), name_of(source))
    elif isinstance(source, (list, tuple)) or hasattr(source, "column_names"):
        yield from _rows(source, name_of(source))
    else:
        raise DataError(f"{type(source).__name__} is no source of examples. Give a path, a Hub id or a DataFrame.")


def name_of(source: Any) -> str:
    """What to call a source in a message: its path, or what it is."""
    if isinstance(source, Mapping):
        return ", ".join(map(str, source))
    return str(source) if isinstance(source, (str, Path)) else f"the {type(source).__name__}"


def is_held_out(name: str) -> bool:
    """Does a file or split name say that it is for validation or testing?"""
    return HELD_OUT.search(Path(name).name.lower()) is not None


def _rows(rows: Iterable[Any], name: str) -> Iterator[Record]:
    for number, row in enumerate(rows, start=1):
        yield Record(row, name, number)


def _files(source: str | Path) -> list[tuple[str, Path]]:
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
        raise DataError(
            f"No data file in the folder {os.path.abspath(path)}. Put .jsonl, .csv or .parquet files there."
        )
    if isinstance(source, str) and HUB_ID.fullmatch(hub_id) and kind_of(text) is None:
        return _from_hub(hub_id)
    raise DataError(f"No data file at {os.path.abspath(path)}. Check the path, or copy your file there.")


def _is_data(file: Path) -> bool:
    hidden = any(part.startswith((".", "_")) for part in file.parts)
    return not hidden and bool(kind_of(file.name)) and file.name != "rejected.jsonl"


def _from_hub(hub_id: str) -> list[tuple[str, Path]]:
    """The training files of a data set on the Hub, downloaded to its cache. Nothing that it contains is ever run.

    Not by `datasets.load_dataset`: that guesses types (an answer "007" becomes the number 7), and refuses a whole data
    set for one broken line.
    """
    from huggingface_hub import HfApi, hf_hub_download

    owner, name, *folder = hub_id.split("/")
    repo = f"{owner}/{name}"
    try:
        siblings = HfApi().dataset_info(repo, files_metadata=True).siblings or []
        sizes = {file.rfilename: file.size or 0 for file in siblings if _is_data(Path(file.rfilename))}
        chosen = choose_hub_files(repo, [file for file in sizes if file.startswith("/".join(folder))])
        if sum(sizes[file] for file in chosen) > LARGEST:
            raise DataError(f"{repo} {TOO_LARGE} Or name one of its folders: {repo}/folder.")
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
    train = [file for file in files if not is_held_out(file)] or files
    folders = sorted({Path(file).parent.as_posix() for file in train})
    if len(folders) > 1 and "." not in folders:
        raise DataError(f"{repo} has several parts: {', '.join(folders[:8])}. Choose one: {repo}/{folders[0]}.")
    return sorted(train)

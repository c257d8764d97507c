"""Any source in, records out: a file, a folder, a data set on the Hub, a table in memory, an upload in Colab.

    records = read("my_examples.csv")              # or "my_folder/", "owner/dataset", a DataFrame, upload()
    for record in records: record.value, record.file, record.line, record.problem

The source is recognised here, its files are parsed by `helpers.data.parsers`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from helpers.data.faults import DataError, Problem
from helpers.data.files import LARGEST, DataFile, Record, first_line, kind_of
from helpers.data.parsers import parse

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

"""From a Hub id to a local folder: only the files that are needed, only if they fit the disk, and a way out where a model is gated.

    folder = from_hub("Qwen/Qwen2.5-1.5B-Instruct")

What is asked first costs a few kilobytes: which files there are, how large, and whether somebody must accept a license. Weights come
as safetensors or not at all. The Hub's own cache keeps them, so a second call downloads nothing and works without a network.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from helpers.files import free_bytes
from helpers.registry import CATALOG, BaseModel, find_row
from helpers.setup import HUB, TOKEN_GOES_INTO, find_token, is_network_error, where

GB = 1e9
SPARE_DISK = 1 * GB  # for what training writes: adapters and checkpoints are some hundred megabytes
TEMPLATE_LINES = 1_000_000  # of a chat template, for one conversation; usual ones take 30 for a question and its answer
SMALL_FILES = ["*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt"]  # configuration, tokenizer, chat template
INDEX = "model.safetensors.index.json"  # names the file of each tensor, where there are several
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
WHOLE = "model.safetensors"  # transformers reads this or the shards, and passes other *.safetensors over for a pickle
NO_SAFETENSORS = (
    "holds no model.safetensors. Pickled weights (.bin) are refused, because loading one can run code: convert the model to "
    "safetensors or choose another."
)


class WeightsError(RuntimeError):
    """No usable weights. The message lists every source that was tried, why it failed, and what to do."""


class HubRefusal(WeightsError):
    """The Hub has the model and does not hand it out, or this machine cannot hold it. The message says what to do; nothing was downloaded."""


@contextmanager
def limited_template() -> Iterator[None]:
    """Let a chat template, a program of the model's, run `TEMPLATE_LINES` lines: counted by the hook that debuggers use, in any thread."""
    left, before = iter(range(TEMPLATE_LINES)), sys.gettrace()

    def count(frame: Any, event: str, argument: Any) -> Any:
        in_template = frame.f_code.co_filename == "<template>"  # jinja2's name for it
        if in_template and next(left, None) is None:
            raise WeightsError("The model's chat template does not come to an end: delete tokenizer.chat_template.")
        return count if in_template else None

    sys.settrace(count)
    try:
        yield
    finally:
        sys.settrace(before)


def cache_folder() -> Path:
    """Where converted weights are kept: beside the Hub's own cache, so `HF_HOME` moves both."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "huggingface"
    return Path(home) / "finetune-kit"


def checked(folder: Path) -> Path:
    """`folder`, if its weights are safetensors (a pickled .bin file could run code while it loads) and none of them is missing."""
    indexed = (folder / INDEX).is_file()
    weights = indexed_files(folder) if indexed else needed_files([file.name for file in folder.glob("*.safetensors")])
    if not weights or not all(name.endswith(".safetensors") for name in weights):
        raise WeightsError(f"{folder} {NO_SAFETENSORS}")
    if WHOLE not in weights and not indexed:  # a part of many, and nothing says of how many
        weights = [INDEX]
    if (folder / "adapter_config.json").is_file():
        raise WeightsError(f"{folder} holds an adapter too, and would load as the model that it names: move that away.")
    for name in ["config.json", *weights]:
        if not (folder / name).is_file():
            raise WeightsError(f"{folder} is not complete, {name} is missing: copy or download it again.")
    return folder


def indexed_files(folder: Path) -> list[str]:
    """The weight files that the index in `folder` names."""
    return sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))


def from_hub(model: str) -> Path:
    """Folder with `config.json`, safetensors and tokenizer of a Hub model. Of a missing one, huggingface_hub's own error is raised.

    Raises `HubRefusal` (gated, pickled, or too large for the disk) or `WeightsError` (no network, and no earlier download).
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import DryRunError, LocalEntryNotFoundError

    readable = {"allow_patterns": [*SMALL_FILES, "*.safetensors"], "ignore_patterns": ["*/*", "adapter_config.json"]}
    try:
        found = snapshot_download(model, **readable, dry_run=True, tqdm_class=_no_bar)
    except Exception as error:
        wraps = isinstance(error, (DryRunError, LocalEntryNotFoundError))
        return _from_cache(model, error.__cause__ if wraps and error.__cause__ else error)
    files = needed_files([file.filename for file in found])
    if not any(name.endswith(".safetensors") for name in files):
        raise HubRefusal(f"{model} {NO_SAFETENSORS}")
    _check_disk(model, sum(file.file_size or 0 for file in found if file.filename in files and file.will_download))
    return checked(Path(snapshot_download(model, allow_patterns=files)))


def _no_bar(*args: Any, **settings: Any) -> tqdm:
    return tqdm(*args, **settings | {"disable": True})  # the dry run downloads nothing


def needed_files(names: list[str]) -> list[str]:
    """Without the second copy of the weights that some repositories hold, such as `consolidated.safetensors` beside the shards."""
    one_set = [WHOLE] if WHOLE in names and INDEX not in names else [name for name in names if SHARD.fullmatch(name)]
    return [name for name in names if not name.endswith(".safetensors") or name in one_set]


def _check_disk(model: str, size: int) -> None:
    from huggingface_hub.constants import HF_HUB_CACHE

    free = free_bytes(Path(HF_HUB_CACHE))
    if size + SPARE_DISK > free:
        raise HubRefusal(
            f"{model} is a download of {size / GB:.1f} GB, and {free / GB:.1f} GB are free at {HF_HUB_CACHE} ({SPARE_DISK / GB:.0f} GB is "
            "kept for training): choose a smaller model, delete old ones (hf cache rm), or set HF_HOME to a larger disk."
        )


def _from_cache(model: str, problem: BaseException) -> Path:
    """What an earlier download left, if the Hub does not answer. If it did and said no, that is `problem`, and raised."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError

    status = getattr(getattr(problem, "response", None), "status_code", 0)
    if isinstance(problem, GatedRepoError):
        raise HubRefusal(how_to_open(model)) from None
    if status == 401 and find_token() and "Invalid" in str(problem):
        raise HubRefusal(
            f"The Hub refuses the token that it was given, as wrong or expired: put a new one from {HUB}/settings/tokens "
            f"into {TOKEN_GOES_INTO[where()]}; or remove it, because most models need none."
        ) from None
    if status < 500 and not is_network_error(problem):
        raise problem
    try:
        return checked(Path(snapshot_download(model, allow_patterns="config.json", local_files_only=True)))
    except (LocalEntryNotFoundError, WeightsError):
        raise WeightsError(f"it does not answer, and {model} is not in its cache, or not all of it") from None


# ---------------------------------------------------------------------------------------------------- gated models


def how_to_open(model: str) -> str:
    """What to do about a gated model: its license, the token, and the nearest model that needs neither."""
    other = _nearest_ungated(model)
    token = f"Then put a token (type: read) from {HUB}/settings/tokens into {TOKEN_GOES_INTO[where()]}."
    if find_token():
        token = (
            "A token is there, but not with that right: it must belong to the account that accepted the license, and a "
            "fine-grained token needs the permission to read gated repositories."
        )
    return (
        f"{model} is gated: accept its license first, signed in, at {HUB}/{model}. {token} Or take the nearest model that "
        f'needs neither: config.model = "{other.short_name}" ({other.shape.parameters() / 1e9:.1f}B parameters).'
    )


def _nearest_ungated(model: str) -> BaseModel:
    """The ungated row of the menu that is nearest in size (by ratio); of unknown size, the first that "auto" would take."""
    from huggingface_hub import HfApi

    try:
        row = find_row(model)
        size = row.shape.parameters() if row else HfApi().model_info(model).safetensors.total
    except Exception:  # no network, no such model, or a repository that does not say
        return CATALOG["Qwen2.5-1.5B-Instruct"]
    ungated = (row for row in CATALOG.values() if not row.gated)
    return min(ungated, key=lambda row: abs(math.log(row.shape.parameters() / size)))

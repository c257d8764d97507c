"""What a folder of weights must hold, and where the ones that we make are kept.

is_complete(folder)        # a configuration and every safetensors file that it should have

From a Hub id to a local folder: only the files that are needed, only if they fit the disk, and a way out where a model is gated.

    folder = from_hub("Qwen/Qwen2.5-1.5B-Instruct")
    folder = from_hub("Qwen/Qwen2.5-7B-Instruct", quantized=True)     # 5.5 GB instead of 15.2, if it is to be trained in 4 bit

What is asked first costs a few kilobytes: which files there are, how large, and whether somebody must accept a license. Weights come as
safetensors or not at all. The Hub's own cache keeps them, so a second call downloads nothing and works without a network.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

from helpers.registry import CATALOG, BaseModel
from helpers.setup import HUB, TOKEN_GOES_INTO, find_token, is_network_error, where

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo


PICKLES_REFUSED = "Pickled weights (.bin) are refused, because loading one can run code; convert the model to safetensors or choose another."


class WeightsError(RuntimeError):
    """No usable weights. The message lists every source that was tried, why it failed, and what to do."""


def cache_folder() -> Path:
    """Where converted weights are kept: beside the Hub's own cache, so `HF_HOME` moves both."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "huggingface"
    return Path(home) / "finetune-kit"


def checked(folder: Path) -> Path:
    """`folder`, if its weights are safetensors (a pickled .bin file could run code while it loads) and none of them is missing."""
    if not any(folder.glob("*.safetensors")):
        raise WeightsError(f"{folder} holds no *.safetensors. {PICKLES_REFUSED}")
    if missing := _missing(folder):
        raise WeightsError(f"{folder} is not complete, {missing[0]} is missing: copy or download it again.")
    return folder


def is_complete(folder: Path) -> bool:
    """Does it hold a configuration and every file of weights that it should?"""
    return not _missing(folder)


def _missing(folder: Path) -> list[str]:
    index, single = "model.safetensors.index.json", "model.safetensors"
    if (folder / index).is_file():
        weights = sorted(set(json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"].values()))
    elif any(folder.glob("*-of-*.safetensors")):  # a part of many, and nothing says of how many
        weights = [index]
    else:
        weights = [file.name for file in folder.glob("*.safetensors")] or [single]
    return [name for name in ["config.json", *weights] if not (folder / name).is_file()]


GB = 1e9
# A 3B model in 16 bit: about ten minutes at 100 Mbit/s. Above it, weights that are 4-bit already are fetched where the menu names some.
SMALL_ENOUGH = 7 * GB
SPARE_DISK = 1 * GB  # for what training writes: adapters and checkpoints are some hundred megabytes
SMALL_FILES = ["*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt"]  # configuration, tokenizer, chat template
TOKENIZER_FILES = [
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
]
SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}\.safetensors")


class HubRefusal(WeightsError):
    """The Hub has the model and does not hand it out, or this machine cannot hold it. The message says what to do; nothing was downloaded."""


def from_hub(model: str, quantized: bool = False) -> Path:
    """Folder with `config.json`, safetensors and tokenizer of a Hub model.

    Args:
        quantized: 4-bit weights will do (for training; not for merging). They are taken if the menu names some and the 16-bit ones are
            larger than 7 GB or than the disk.

    Raises:
        HubRefusal: gated, pickled weights only, or too large for the disk.
        WeightsError: no network, and no earlier download.
        huggingface_hub's own errors: no such model.
    """
    row = next((row for row in CATALOG.values() if model in (row.id, row.short_name)), None)
    if quantized and row is not None and row.prequantized and is_complete(_combined(row)):
        return _combined(row)
    info = _ask(model)
    if info is None:
        return _cached(model)
    files = needed_files({file.rfilename: file.size or 0 for file in info.siblings})
    if not any(name.endswith(".safetensors") for name in files):
        raise HubRefusal(f"{model} holds no *.safetensors on the Hub. {PICKLES_REFUSED}")
    if info.gated and not find_token():
        raise HubRefusal(how_to_open(model, info))
    size = _missing_bytes(model, info.sha, files)
    if quantized and row is not None and row.prequantized and (size > SMALL_ENOUGH or size + SPARE_DISK > _free_disk()):
        folder = _prequantized(row, size)
        if folder is not None:
            return folder
    _check_disk(model, size)
    return _download(model, info, list(files))


def needed_files(sizes: dict[str, int]) -> dict[str, int]:
    """Of a repository's files (name -> bytes), those that transformers reads: small ones, and one complete set of safetensors.

    Some repositories hold their weights twice (`consolidated.safetensors` beside the shards), or other formats in subfolders.
    """
    top = {name: size for name, size in sizes.items() if "/" not in name}
    small = {name: size for name, size in top.items() if any(fnmatch(name, pattern) for pattern in SMALL_FILES)}
    weights = {name: size for name, size in top.items() if name.endswith(".safetensors")}
    if "model.safetensors.index.json" in top:
        weights = {
            name: size for name, size in weights.items() if (shard := SHARD.fullmatch(name)) and shard[1] == "model"
        }
    elif "model.safetensors" in weights:
        weights = {"model.safetensors": weights["model.safetensors"]}
    return small | weights


# ------------------------------------------------------------------------------------------------------ ask, and check


def _ask(model: str) -> ModelInfo | None:
    """What the Hub says about the model; None if it cannot be reached."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError

    try:
        return HfApi().model_info(model, files_metadata=True)
    except GatedRepoError:
        raise HubRefusal(how_to_open(model)) from None
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", 0)
        if status == 401 and find_token() and "Invalid" in str(error):
            raise HubRefusal(
                f"The Hub refuses the token that it was given: it is wrong or has expired. Make a new one at "
                f"{HUB}/settings/tokens and put it into {TOKEN_GOES_INTO[where()]}; or remove it, because most models need none."
            ) from None
        if status >= 500:
            return None
        raise
    except Exception as error:
        if is_network_error(error):  # offline mode (HF_HUB_OFFLINE) raises one too
            return None
        raise


def how_to_open(model: str, info: ModelInfo | None = None) -> str:
    """What to do about a gated model: its license, the token, and the nearest model that needs neither."""
    row = next((row for row in CATALOG.values() if row.id == model), None)
    parameters = row.shape.parameters() if row else getattr(getattr(info, "safetensors", None), "total", None)
    other = nearest_ungated(parameters)
    if find_token():
        token = (
            "A token is there, but not with that right: it must belong to the account that accepted the license, and a fine-grained token "
            "needs the permission to read gated repositories."
        )
    else:
        token = f"Then make a token (type: read) at {HUB}/settings/tokens and put it into {TOKEN_GOES_INTO[where()]}. Run this cell again."
    return (
        f"{model} is gated: accept its license first, signed in, at {HUB}/{model}. {token} "
        f'Or take the nearest model that needs neither: config.model = "{other.short_name}" '
        f"({other.shape.parameters() / 1e9:.1f}B parameters)."
    )


def nearest_ungated(parameters: int | None) -> BaseModel:
    """The ungated row of the menu that is nearest in size (by ratio); of unknown size, the first that "auto" would take."""
    if not parameters:
        return CATALOG["Qwen2.5-1.5B-Instruct"]
    open_rows = (row for row in CATALOG.values() if not row.gated)
    return min(open_rows, key=lambda row: abs(math.log(row.shape.parameters() / parameters)))


def _missing_bytes(model: str, revision: str, files: dict[str, int]) -> int:
    """What is still to be downloaded."""
    from huggingface_hub import try_to_load_from_cache

    return sum(
        size
        for name, size in files.items()
        if not isinstance(try_to_load_from_cache(model, name, revision=revision), str)
    )


def _free_disk() -> int:
    from huggingface_hub.constants import HF_HUB_CACHE

    place = Path(HF_HUB_CACHE)
    while not place.is_dir():
        place = place.parent
    return shutil.disk_usage(place).free


def _check_disk(model: str, size: int) -> None:
    from huggingface_hub.constants import HF_HUB_CACHE

    free = _free_disk()
    if size + SPARE_DISK > free:
        raise HubRefusal(
            f"{model} is a download of {size / GB:.1f} GB, and {free / GB:.1f} GB are free at {HF_HUB_CACHE} ({SPARE_DISK / GB:.0f} GB is kept for "
            "what training writes). Choose a smaller model, delete old ones there (hf cache rm), or set HF_HOME to a larger disk."
        )


# ------------------------------------------------------------------------------------------------------ download


def _download(model: str, info: ModelInfo, files: list[str], into: Path | None = None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError

    try:
        return Path(snapshot_download(model, allow_patterns=files, local_dir=into))
    except GatedRepoError:
        raise HubRefusal(how_to_open(model, info)) from None


def _cached(model: str) -> Path:
    """What an earlier download left.

    Raises:
        WeightsError: nothing, or only a part.
    """
    from huggingface_hub import try_to_load_from_cache

    file = try_to_load_from_cache(model, "config.json")
    if not isinstance(file, str):
        raise WeightsError(f"it does not answer, and {model} is not in its cache")
    if not is_complete(Path(file).parent):
        raise WeightsError(f"it does not answer, and only a part of {model} is in its cache")
    return Path(file).parent


def _combined(row: BaseModel) -> Path:
    return cache_folder() / f"{row.short_name}-4bit"


def _prequantized(row: BaseModel, full_size: int) -> Path | None:
    """The menu's 4-bit copy with the original's tokenizer, in one folder; None (and why) if it is not what it should be.

    Copies are often published with another tokenizer, padding token or chat template, so only weights and configuration are theirs.
    """
    from huggingface_hub.errors import HfHubHTTPError

    folder = _combined(row)
    try:
        copy, original = _ask(row.prequantized), _ask(row.id)
        if copy is None or original is None:
            raise WeightsError("it does not answer")
        files = needed_files({file.rfilename: file.size or 0 for file in copy.siblings})
        weights = [name for name in files if name.endswith((".safetensors", ".safetensors.index.json"))]
        size = sum(files[name] for name in weights)
        _check_disk(row.prequantized, size)
        print(
            f"Taking {row.prequantized} ({size / GB:.1f} GB) for the weights of {row.id} ({full_size / GB:.1f} GB): the same ones, in 4 bit before "
            "the download instead of after it."
        )
        _download(row.prequantized, copy, ["config.json"], folder)
        if problem := _unlike(row, json.loads((folder / "config.json").read_text(encoding="utf-8"))):
            shutil.rmtree(folder)
            raise WeightsError(problem)
        names = [file.rfilename for file in original.siblings]
        _download(
            row.id,
            original,
            [name for name in names if any(fnmatch(name, pattern) for pattern in TOKENIZER_FILES)],
            folder,
        )
        _download(row.prequantized, copy, weights, folder)  # last, because with them the folder counts as complete
        return folder
    except (
        WeightsError,
        HfHubHTTPError,
    ) as error:  # the original remains; a broken connection is raised, and continues when asked again
        print(f"{row.prequantized} is of no use here ({str(error).splitlines()[0]:.120}): taking {row.id} itself.")
        return None


def _unlike(row: BaseModel, config: dict) -> str:
    """What is different from the model on the menu, in words; empty if nothing that matters is."""
    settings = config.get("quantization_config", {})
    if not settings.get("load_in_4bit") or settings.get("bnb_4bit_quant_type") != "nf4":
        return "its weights are not in NF4"
    shape = row.shape
    for name in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size"):
        if config.get(name) != getattr(shape, name):
            return f"its {name} is {config.get(name)}, not {getattr(shape, name)}"
    return ""

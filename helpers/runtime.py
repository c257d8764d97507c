"""Where are we running, and what can be reached from here?"""

from __future__ import annotations

import os
import sys
import urllib.error
import urllib.request
from pathlib import Path

HUB = "https://huggingface.co"
DRIVE = Path("/content/drive/MyDrive")  # where Colab mounts Google Drive
TOKEN_GOES_INTO = {
    "colab": "Colab's secrets (the key icon on the left) under the name HF_TOKEN, with notebook access switched on",
    "kaggle": "Kaggle's secrets (Add-ons > Secrets) under the label HF_TOKEN, attached to this notebook",
    "local": "the environment variable HF_TOKEN, before Jupyter starts",
}


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


def is_network_error(error: Exception) -> bool:
    """Did the Hub not answer at all? huggingface_hub 1 raises httpx's errors, huggingface_hub 2 those of httpx2."""
    return isinstance(error, ConnectionError) or type(error).__module__.partition(".")[0] in (
        "httpx",
        "httpx2",
        "httpcore",
        "httpcore2",
    )


def drive_is_there() -> bool:
    """Is Google Drive mounted, and does it answer? (A mount that has died raises errors instead of saying no.)"""
    return os.path.isdir(DRIVE)


def second_place() -> Path | None:
    """A folder for copies of runs that outlives the session: on Google Drive if it is mounted (mounting it is the opt-in)."""
    return DRIVE / "finetune-kit" / "runs" if drive_is_there() else None


def mount_drive() -> bool:
    """Mount Google Drive in Colab, so that runs are copied there; True if it worked. Colab asks for permission in a window.

    It often fails (a closed window, an organisation's rules, Google's side), and training works without it, so an error is told, not raised.
    """
    if drive_is_there():
        return True
    if where() != "colab":
        print("[WARN] Google Drive can be mounted in Colab only. Runs stay in runs/ on this machine.")
        return False
    try:
        from google.colab import drive

        drive.mount(str(DRIVE.parent))
    except (
        Exception
    ) as error:  # ValueError("mount failed"), credentials, a folder in the way: Colab raises what it likes
        print(
            f"[WARN] Google Drive could not be mounted ({error}). Training works without it: download what you want to keep before the "
            "session ends (helpers.export: zip_folder, download)."
        )
        return False
    return drive_is_there()


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

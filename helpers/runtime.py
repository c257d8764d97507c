"""Where are we running, and what can be reached from here?"""

from __future__ import annotations

import os
import urllib.error
import urllib.request

HUB = "https://huggingface.co"


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

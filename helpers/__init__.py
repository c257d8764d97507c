"""The thin package behind the notebooks: it decides, checks, explains and shows; it never wraps.

What comes out is always the ecosystem's own object (`LoraConfig`, `SFTConfig`, `PeftModel`, `datasets.Dataset`), so that you can walk away
from this package at any time. Data flows one way: config, hardware, registry -> memory, dryrun -> planner -> recipe -> data, models,
train -> runs -> diagnosis, plots, evaluation -> export.
"""

import logging
import os
import platform
import sys

if sys.version_info < (3, 10):  # said before any other import can fail with a less helpful message
    raise ImportError(
        "This kit needs Python 3.10 or newer, and this is Python %d.%d. "
        "Install a newer Python and make a fresh environment with it." % sys.version_info[:2]
    )

# PyTorch reads this when it starts. What it does, and where it cannot be used: `growing_segments` in helpers/hardware.py.
if "torch" not in sys.modules and sys.platform == "linux" and "microsoft" not in platform.release().lower():
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

# TRL tells the Hub of every trainer that is made, and huggingface_hub first asks it for a list. Set this to 0 to let them.
if os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1") != "0" and "huggingface_hub.constants" in sys.modules:
    # it has read the environment already
    vars(sys.modules["huggingface_hub.constants"])["HF_HUB_DISABLE_TELEMETRY"] = True

# On some CPUs bitsandbytes warns, in red, that it found no faster kernels. They are for inference only, and nobody has to act.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

"""The thin package behind the notebooks: it decides, checks, explains and shows; it never wraps.

What comes out is always the ecosystem's own object (`LoraConfig`, `SFTConfig`, `PeftModel`, `datasets.Dataset`), so that you
can walk away from this package at any time. Data flows one way:

    config ─┐
    hardware ┼─► planner ─► recipe ─► training ─► runs ─► charts, evaluation ─► export
    catalog ─┘
"""

import sys

if sys.version_info < (3, 10):  # said before any other import can fail with a less helpful message
    raise ImportError(
        "This kit needs Python 3.10 or newer, and this is Python %d.%d. "
        "Install a newer Python and make a fresh environment with it." % sys.version_info[:2]
    )

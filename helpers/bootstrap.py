"""The first cell's second half: install what is missing, upgrade nothing, need no restart.

    install_what_is_missing()

Free Colab and Kaggle ship torch, transformers, PEFT and most else. Upgrading one of those under a running notebook is how
notebooks break, so what is there stays as it is; what is missing comes in the version that we test (constraints.txt), without its own
dependencies. Standard library only, because this runs before anything else may be imported.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import invalidate_caches
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).parent.parent
TORCHAO_THAT_PEFT_ACCEPTS = (0, 16)  # PEFT 0.19 to 0.21 raise an ImportError on older ones (peft/import_utils.py)


def is_hosted() -> bool:
    """Is this Colab or Kaggle, where the runtime belongs to somebody else and ends by itself?"""
    return "google.colab" in sys.modules or "KAGGLE_KERNEL_RUN_TYPE" in os.environ


def numbers(text: str) -> tuple[int, ...]:
    """ "2.11.0+cu128" -> (2, 11, 0): enough to compare releases."""
    return tuple(int(part) for part in re.findall(r"\d+", text.partition("+")[0])[:3])


def requirements() -> dict[str, tuple[int, ...]]:
    """Package -> lowest version that we support, from requirements.txt."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    found = (re.match(r"([\w.-]+)>=([\w.]+)", line) for line in lines)
    return {match[1]: numbers(match[2]) for match in found if match}


def tested(package: str) -> str:
    """`package==version` as constraints.txt has it."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return next(line.strip() for line in lines if line.lower().startswith(f"{package.lower()}=="))


def installed(package: str) -> tuple[int, ...] | None:
    try:
        return numbers(version(package))
    except PackageNotFoundError:
        return None


def install_what_is_missing() -> None:
    """Install the requirements that are not there. Running it again does nothing.

    Raises:
        RuntimeError: torch itself is missing, or pip failed; says which command to run.
    """
    missing = [package for package in requirements() if installed(package) is None]
    if "torch" in missing:
        raise RuntimeError(
            "PyTorch is not installed. Take the command for your system from https://pytorch.org/get-started/locally/, "
            "then run: pip install -r requirements.txt -c constraints.txt"
        )
    if is_hosted():
        _remove_old_torchao()
    if missing:
        wanted = [tested(package) for package in missing]
        print(f"Installing {', '.join(wanted)} ...")
        alone = ["--no-deps"] if is_hosted() else ["--constraint", str(ROOT / "constraints.txt")]
        _pip("install", *alone, *wanted)
        invalidate_caches()
    stale = [name for name in requirements() if _is_stale(name)]
    if stale:
        print(f"Restart once: {', '.join(stale)} was imported before it was installed in the right version.")


def _remove_old_torchao() -> None:
    found = installed("torchao")
    if found is not None and found < TORCHAO_THAT_PEFT_ACCEPTS:
        print("Removing torchao: PEFT refuses this old version, and nothing here needs it.")
        _pip("uninstall", "--yes", "torchao")


def _is_stale(package: str) -> bool:
    """Was the package imported in a version that is not the one installed now?"""
    loaded = getattr(sys.modules.get(package), "__version__", None)
    return loaded is not None and installed(package) is not None and numbers(loaded) != installed(package)


def _pip(*arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:] or ["no message"]
        raise RuntimeError(f"pip {' '.join(arguments)} failed: {said[0]}. Check the network, then run this cell again.")

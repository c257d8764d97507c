"""The environments of `make test-colab` and `make test-newest`, made anew: the checks look at what the first cell changes in them.

    python3 -m tests.colab.make_environment colab .venv-colab      # Colab's versions, see pins.txt
    python3 -m tests.colab.make_environment newest .venv-newest    # the newest of everything in requirements-dev.txt

Colab's real pair is Python 3.13 and torch 2.11.0 with its CUDA libraries (4.6 GB, about two minutes). Where there is no Python 3.13
or too little disk for that, the nearest pair is the Python that runs this and torch 2.13.0, which also exists as a small CPU build.
Needs nothing but the standard library.
"""

from __future__ import annotations

import argparse
import glob
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PINS = Path(__file__).with_name("pins.txt")
NEAREST_TORCH = "torch==2.13.0"
DISK_GB = 15  # for Colab's pair: the environment has 5.4 GB, pip unpacks the wheels (2.5 GB) beside it, and tests write checkpoints
GB = 10**9


@dataclass(frozen=True)
class Pair:
    """A Python, a torch, and the reason, in words."""

    python: str
    torch: str
    why: str


def find_python(version: str = "3.13") -> str | None:
    """The first Python of this version that starts and can make an environment: this one, on PATH, or one of pyenv's."""
    folders = os.environ.get("PATH", os.defpath).split(os.pathsep)
    pyenv = os.environ.get("PYENV_ROOT") or str(Path.home() / ".pyenv")
    candidates = [sys.executable, *(os.path.join(folder, f"python{version}") for folder in folders)]
    candidates += sorted(glob.glob(os.path.join(pyenv, "versions", f"{version}*", "bin", f"python{version}")))
    return next((python for python in candidates if os.path.isfile(python) and is_version(python, version)), None)


def is_version(python: str, version: str) -> bool:
    """Does it start, as this version? pyenv's stand-ins on PATH are there for each version, and refuse if it is not the chosen one."""
    code = "import ensurepip, ssl, sys; print('%d.%d' % sys.version_info[:2])"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0 and done.stdout.strip() == version


def choose(python: str | None, free_bytes: int, torch: str) -> Pair:
    """Colab's real pair if there is `python` (of Colab's version) and room for it on the disk, else the nearest."""
    room = f"{free_bytes / GB:.0f} GB of disk are free"
    if python is None:
        return Pair(sys.executable, NEAREST_TORCH, "the nearest to Colab's pair, because no Python 3.13 was found here")
    if free_bytes < DISK_GB * GB:
        return Pair(
            sys.executable, NEAREST_TORCH, f"the nearest to Colab's pair, because only {room} and that needs {DISK_GB}"
        )
    return Pair(python, torch, f"Colab's own pair, because a Python 3.13 is here and {room}")


def pins() -> tuple[str, list[str]]:
    """(torch, all others) as `package==version`."""
    found = re.findall(r"^[\w.-]+==\S+$", PINS.read_text(encoding="utf-8"), re.MULTILINE)
    return next(pin for pin in found if pin.startswith("torch==")), [
        pin for pin in found if not pin.startswith("torch==")
    ]


def make(folder: Path, python: str, *installs: list[str]) -> None:
    """A fresh environment, and one `pip install` in it for each list of arguments."""
    subprocess.run([python, "-m", "venv", str(folder)], check=True)
    for arguments in installs:
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, *arguments], check=True, cwd=ROOT)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("versions", choices=["colab", "newest"])
    parser.add_argument("folder", type=Path, help="an environment that is there already is replaced")
    chosen = parser.parse_args(arguments)
    if chosen.folder.exists():
        shutil.rmtree(chosen.folder)
    python = find_python()
    if chosen.versions == "newest":
        print(f"{chosen.folder}: the newest of everything on {python or sys.executable}", flush=True)
        make(chosen.folder, python or sys.executable, ["--upgrade", "--requirement", "requirements-dev.txt"])
        return
    torch, others = pins()
    pair = choose(python, shutil.disk_usage(ROOT).free, torch)
    print(f"{chosen.folder}: {pair.python} and {pair.torch}, {pair.why}", flush=True)
    # torch with all that it needs; then exactly the listed versions, as what some of Colab's packages ask for is not what Colab has.
    make(chosen.folder, pair.python, [pair.torch], ["--no-deps", *others])


if __name__ == "__main__":
    main()

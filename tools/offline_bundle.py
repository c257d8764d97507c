"""Pack everything that a laptop without network needs into one folder and one zip: wheels, model, data, notebooks, install script.

    python -m tools.offline_bundle                                        # or: make offline-bundle; for machines like this one
    python -m tools.offline_bundle --platform win_amd64 --python 3.12 --into runs/bundle-windows
    python -m tools.offline_bundle --index URL                            # where pip looks besides, for a PyTorch without CUDA

The folder is the kit itself (without tests), with `wheels/`, `install.py` and `OFFLINE.md`. On Linux, PyTorch from the usual index
brings gigabytes of CUDA; PyTorch's page of install commands names an index with CPU builds, which `--index` takes.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
import sysconfig
import time
import zipfile
from pathlib import Path

from helpers.weights import fetch_wheel
from tools import course, foreign_wheels

FOLDERS = ("notebooks", "helpers", "data_samples", "tools", "benchmarks")
FILES = (
    "README.md",
    "LICENSE",
    "Makefile",
    "pyproject.toml",
    "requirements.txt",
    "requirements-dev.txt",
    "constraints.txt",
)
LEFT_OUT = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "*.part", "rejected.jsonl")
TO_OPEN_NOTEBOOKS = ["jupyterlab", "nbclient", "nbconvert", "ipykernel"]
README = """# The fine-tuning course, without network

Made for Python {python} on {platform}. You need 4 GB of free RAM and about 3 GB of disk; no network and no administrator rights.

1. Copy this whole folder to the disk (installing from a stick is slow).
2. In the folder, run

       python install.py

   On Windows, `py -{python} install.py`. If it says that Python is another version, use the one that it names.
3. Open the notebooks as it tells you at the end.

Everything is installed into `.venv` in this folder. To be rid of it, delete the folder, and `finetune-kit` in `.cache/huggingface` in your
home folder, where the unpacked model is kept.
"""


def copy_kit(folder: Path) -> None:
    """The kit's own files, with the install script on top."""
    for name in FOLDERS:
        shutil.copytree(course.ROOT / name, folder / name, ignore=LEFT_OUT, dirs_exist_ok=True)
    for name in FILES:
        shutil.copy(course.ROOT / name, folder / name)
    shutil.copy(Path(__file__).parent / "offline_install.py", folder / "install.py")


def download_here(wheels: Path, index: list[str]) -> None:
    """Wheels for this machine and Python, as pip resolves them."""
    wanted = ["-r", "requirements.txt", *TO_OPEN_NOTEBOOKS, "-c", "constraints.txt"]
    command = [*foreign_wheels.DOWNLOAD, str(wheels), *wanted, *index]
    done = subprocess.run(command, cwd=course.ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(
            f"pip could not download the wheels. Check the network, then run this again.\n{done.stderr[-1500:]}"
        )


def bundle(into: Path, target: str = "", python: str = "", index: list[str] | None = None) -> Path:
    """Fill the folder `into` and write the zip beside it.

    Args:
        target, python: platform tag of the wheels (win_amd64, ...) and Python version (3.12). Default: this machine's.

    Returns:
        the path of the zip.
    """
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    wheels = into / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    copy_kit(into)
    if target:
        roots = foreign_wheels.requirements(course.ROOT / "requirements.txt", TO_OPEN_NOTEBOOKS)
        foreign_wheels.download(roots, wheels, target, python or here, course.ROOT / "constraints.txt", index or [])
    else:
        download_here(wheels, index or [])
    fetch_wheel(wheels)
    made_for = {
        "python": python or here,
        "platform": target or sysconfig.get_platform(),
        "packages": TO_OPEN_NOTEBOOKS,
        "system": foreign_wheels.system_of(target) if target else platform.system(),
    }
    (into / "bundle.json").write_text(json.dumps(made_for, indent=1), encoding="utf-8")
    (into / "OFFLINE.md").write_text(README.format(**made_for), encoding="utf-8")
    return pack(into)


def pack(folder: Path) -> Path:
    """One zip beside the folder. Wheels are compressed already and only stored."""
    target = folder.with_name(f"{folder.name}.zip")
    draft = target.with_name(f"{target.name}.part")
    with zipfile.ZipFile(draft, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            how = zipfile.ZIP_STORED if file.suffix == ".whl" else zipfile.ZIP_DEFLATED
            archive.write(file, Path(folder.name) / file.relative_to(folder), compress_type=how)
    draft.replace(target)
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--into", type=Path, default=course.ROOT / "runs" / "offline-bundle")
    parser.add_argument(
        "--platform",
        default="",
        help="win_amd64, macosx_14_0_arm64, manylinux_2_28_x86_64, ... (default: this machine's)",
    )
    parser.add_argument(
        "--python", default="", help="version of the laptops' Python, such as 3.12; only with --platform"
    )
    parser.add_argument("--index", action="append", default=[], metavar="URL", help="an index where pip looks besides")
    chosen = parser.parse_args()
    if chosen.python and not chosen.platform:
        parser.error(
            "--python needs --platform: for this machine, run the command with the Python that the laptops have"
        )
    if (chosen.into / "bundle.json").is_file():  # an older bundle, which holds nothing else
        shutil.rmtree(chosen.into)
    elif chosen.into.exists() and (not chosen.into.is_dir() or any(chosen.into.iterdir())):
        parser.error(
            f"{chosen.into} is there and is no finished bundle: delete it, or choose another folder with --into"
        )
    started = time.monotonic()
    zipped = bundle(
        chosen.into,
        chosen.platform,
        chosen.python,
        [word for url in chosen.index for word in ("--extra-index-url", url)],
    )
    count = len(list((chosen.into / "wheels").glob("*.whl")))
    print(
        f"{count} wheels, model, data and notebooks: {zipped}, {zipped.stat().st_size / 2**20:.0f} MiB, "
        f"in {time.monotonic() - started:.0f} s. Unpack it and run python install.py there."
    )


if __name__ == "__main__":
    main()

"""Mounting Google Drive: here, a folder is made, or the error raised that Colab raises."""

from pathlib import Path

FAILS = ""  # "mount failed", "credential propagation was unsuccessful", ...


def mount(mountpoint: str) -> None:
    if FAILS:
        raise ValueError(FAILS)
    (Path(mountpoint) / "MyDrive").mkdir(parents=True)

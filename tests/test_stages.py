"""The table of minutes at the end of CI: one line per stage, whatever happened. Needs no torch."""

import os
import shlex
import subprocess
import sys

import pytest

from tools import stages

PYTHON = shlex.quote(sys.executable)


@pytest.mark.skipif(
    sys.platform == "win32", reason="commands are split as a POSIX shell would, and `make` is not for Windows"
)
def test_stages_inside_a_stage_get_their_own_lines_and_a_failure_ends_it_all(root):
    inner = f"{PYTHON} -m tools.stages true false never"
    outermost = {
        name: value for name, value in os.environ.items() if name != stages.ROWS
    }  # CI runs this test in a stage of its own
    command = [sys.executable, "-m", "tools.stages", "true", inner, "never"]
    done = subprocess.run(command, cwd=root, env=outermost, capture_output=True, text=True)
    rows = [line.split() for line in done.stdout.strip().splitlines()]
    assert done.returncode == 1 and "never" not in done.stdout
    assert rows[0] == ["stage", "minutes"] and rows[-1][0] == "all"
    assert [row[0] for row in rows[1:-1]] == ["true", "true", "false"] and rows[-2][-1] == "failed"


def test_the_table_adds_up(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('["make lint", 6, 0]\n["make notebooks", 606, 2]\n', encoding="utf-8")
    _, header, lint, notebooks, total = stages.table(rows).split("\n")
    assert [header.split()[-1], *(line.split()[2] for line in (lint, notebooks))] == ["minutes", "0.1", "10.1"]
    assert notebooks.endswith("failed") and total.startswith("all") and "10.2" in total

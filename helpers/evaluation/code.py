"""Code that was generated, judged by running it: do its assertions pass?

score = passes_assertions("data_samples/python_functions.jsonl")
table = compare_before_after(model, tokenizer, validation, score=score, max_new_tokens=300)

The code runs in a process of its own with a time limit, in an empty folder, in Python's isolated mode (no site of yours, no PYTHON*
variables) and without your environment, so without tokens. That stops accidents, not attacks: score only models that you trust.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

SECONDS = 10.0
FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)
KEPT_VARIABLES = ("SYSTEMROOT", "TEMP", "TMP")  # without these, Python does not start on Windows


def passes_assertions(
    file: str | Path, code: str = "output", test: str = "test", seconds: float = SECONDS
) -> Callable[[str, str], bool]:
    """A score for `compare_before_after`: does the answer pass the assertions that belong to its reference?

    Args:
        file: JSON lines with the reference in the column `code` and its assertions in `test`.
        seconds: time limit of one answer.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line has no assertions.
    """
    tests = {}
    for number, line in enumerate(Path(file).read_text(encoding="utf-8").splitlines(), start=1):
        row = json.loads(line)
        if not row.get(test):
            raise ValueError(f"{file}, line {number}: no assertions in the column {test!r}.")
        tests[row[code].strip()] = row[test]

    def score(answer: str, reference: str) -> bool:
        if reference.strip() not in tests:
            raise ValueError(
                f"No assertions in {file} for the reference {reference[:40]!r}...: score examples of that file."
            )
        return runs_through(plain_code(answer), tests[reference.strip()], seconds)

    return score


def plain_code(answer: str) -> str:
    """The code in the first ``` block, if there is one."""
    found = FENCE.search(answer)
    return found.group(1) if found else answer


def runs_through(code: str, assertions: str, seconds: float = SECONDS) -> bool:
    """Does `code` followed by `assertions` reach its end in time? Leaving early, even politely, does not count."""
    word = secrets.token_hex(8)  # printed by the last line only
    environment = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "answer.py"
        program.write_text(f"{code}\n\n{assertions}\n\nprint({word!r})\n", encoding="utf-8", errors="replace")
        try:
            done = subprocess.run(
                [sys.executable, "-I", str(program)],
                cwd=folder,
                env=environment,
                timeout=seconds,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        except subprocess.TimeoutExpired:
            return False
    return done.returncode == 0 and done.stdout.decode(errors="replace").rstrip().endswith(word)

"""The quickstart on the newest versions of everything, before they reach anybody else.

    make test-newest        # a fresh environment in .venv-newest, everything as new as it gets (make_environment.py); then this

Not part of CI, because it changes from day to day without us. Exit status 0 if the quickstart, the keyword check, the plans for cards and
the rehearsals pass, or fail in the way that EXPECTED says; an expectation that no longer fails is a failure too, so that the list stays short.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from importlib.metadata import distributions
from pathlib import Path

from tests.colab.check import IN_PROCESSES, PLANS, REHEARSALS, ROOT, lower_budget
from tests.colab.colab_machine import ColabMachine

# Words of the error -> the upstream reason, with its issue. Empty: everything passes (seen on 2026-11-24).
EXPECTED: dict[str, str] = {}


def newer_than_tested() -> list[str]:
    """`package tested -> installed` for what differs from constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    tested = dict(line.strip().lower().replace("_", "-").split("==") for line in lines if "==" in line)
    here = {dist.metadata["Name"].lower().replace("_", "-"): dist.version.partition("+")[0] for dist in distributions()}
    return [f"{name} {old} -> {here[name]}" for name, old in sorted(tested.items()) if here.get(name, old) != old]


def main() -> int:
    changed = newer_than_tested()
    print("newer than constraints.txt: " + (", ".join(changed) or "nothing"))
    with tempfile.TemporaryDirectory(prefix="newest-") as scratch:
        machine = ColabMachine(ROOT, Path(scratch), colab=False)
        machine.publish()
        machine.download_beforehand()
        notebook = machine.open_notebook("00_quickstart.ipynb")
        lower_budget(notebook)
        executed = machine.execute(notebook, first_step_in="runs/quickstart/history.jsonl")
        page = machine.results / "report.html"
        said = page.read_text(encoding="utf-8") if page.is_file() else ""
    tests = ["tests/test_keywords.py", "tests/test_unmet.py", *PLANS, *REHEARSALS]
    tested = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *IN_PROCESSES, *tests], cwd=ROOT, text=True, stdout=subprocess.PIPE
    )
    print(tested.stdout)
    failed = executed.returncode != 0 or tested.returncode != 0
    reasons = [reason for words, reason in EXPECTED.items() if re.search(words, said + tested.stdout)]
    for reason in reasons:
        print(f"expected: {reason}")
    if EXPECTED and not failed:
        print("FAILED: nothing fails any more; take the reason out of EXPECTED")
        return 1
    return int(failed and not reasons)


if __name__ == "__main__":
    sys.exit(main())

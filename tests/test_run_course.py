"""The command that executes the course: it notices what fails, and keeps apart what shares a run. Needs no torch."""

import json
import threading
import time

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

from tools import run_course
from tools.run_course import Result, run_all, wrong_checks

IMPORT = "from notebooks.lessons.halves import check_half, check_third as check_other"
BOTH = f"{IMPORT}\ncheck_half(2); check_other(1)"


def executed(*cells: tuple[str, str]) -> nbformat.NotebookNode:
    """A notebook after its execution: (source, what it printed) for each code cell."""
    printed = [(source, [new_output("stream", name="stdout", text=text)] if text else []) for source, text in cells]
    return new_notebook(cells=[new_code_cell(source, outputs=outputs) for source, outputs in printed])


@pytest.mark.parametrize(
    ("cells", "wrong"),
    [
        ([(f"{IMPORT}\ncheck_half(2)", "Right: half.\n"), ("check_other(1)", "some text\nRight, a third.\n")], []),
        ([(f"{IMPORT}\ncheck_half(2)", "Not yet: is that half?\n")], ["check_half said 'Not yet: is that half?'"]),
        ([(f"{IMPORT}\ncheck_half(2)", "Your turn")], ["check_half said 'Your turn'"]),
        ([(f"{IMPORT}\ncheck_half(2)", "")], ["check_half said ''"]),
        ([(BOTH, "Right\nNot yet: All Right\n")], ["check_half, check_other said 'Right\\nNot yet: All Right'"]),
        ([(IMPORT, ""), ("print('Right')", "Right\n")], ["no check is called"]),
    ],
)
def test_a_solution_must_say_right_at_each_check(cells, wrong):
    assert wrong_checks(executed(*cells)) == wrong


def test_notebooks_that_share_a_run_go_one_after_the_other_and_in_order(tmp_path, monkeypatch):
    paths = [tmp_path / f"{name}.ipynb" for name in ("01_a", "02_b", "04_c", "05_d", "06_e")]
    began, running, together, lock = [], set(), [], threading.Lock()

    def execute(path, into, core, threads):
        with lock:
            began.append(path)
            running.add(path)
            together.append(set(running))
        time.sleep(0.05)
        with lock:
            running.remove(path)
        return Result(path.stem, 1.0, 0.5)

    monkeypatch.setattr(run_course, "execute", execute)
    assert [result.name for result in run_all(paths, tmp_path, jobs=2)] == [path.stem for path in paths]
    assert max(map(len, together)) == 2
    assert all(len([path for path in at_once if path in paths[2:]]) <= 1 for at_once in together)
    assert [path for path in began if path in paths[2:]] == paths[2:]


@pytest.mark.slow
def test_what_a_notebook_did_is_measured_and_what_fails_is_named(tmp_path, say):
    pages = {
        "01_good.ipynb": "print('fine')",
        "02_bad.ipynb": "raise ValueError('broken on purpose')",
        "solutions/01_good.ipynb": "print('Right')",
    }
    (tmp_path / "solutions").mkdir()
    for name, source in pages.items():
        nbformat.write(new_notebook(cells=[new_code_cell(source)]), tmp_path / name)
    results = run_all([tmp_path / name for name in pages], tmp_path / "out", jobs=2)
    good, bad, unchecked = results
    assert (good.name, good.problem) == ("01_good", "") and good.seconds > 0 and 0 < good.peak_gib < 1
    assert (
        bad.problem.startswith("ValueError: broken on purpose") and str(tmp_path / "out/02_bad/log.txt") in bad.problem
    )
    assert unchecked.name == "solutions_01_good" and unchecked.problem == "no check is called"
    assert "fine" in (tmp_path / "out/01_good/log.txt").read_text()
    assert json.loads((tmp_path / "out/01_good/executions.jsonl").read_text())["notebook"] == "01_good.ipynb"
    assert not nbformat.read(tmp_path / "01_good.ipynb", as_version=4).cells[0].outputs
    for result in results:
        say(run_course.row(result))

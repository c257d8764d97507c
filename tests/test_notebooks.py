"""What every notebook must keep to. Needs no torch; reads the files only.

Lessons (notebooks/NN_*.ipynb) keep all rules; solutions those of code that runs; worksheets have gaps on purpose, so only those of
files.
"""

import ast
import builtins
import itertools
import json
import shutil
import statistics
from pathlib import Path

import nbformat
import pytest

from tools import stamp
from tools.course import code_cells, lessons, lines_of_code, prose, read, solutions, worksheets

LESSONS, SOLUTIONS, WORKSHEETS = lessons(), solutions(), worksheets()
QUICKSTART = LESSONS[0]


def name(path: Path) -> str:
    return path.stem if path in LESSONS else f"{path.parent.name}/{path.stem}"


@pytest.fixture(params=LESSONS, ids=name)
def lesson(request):
    return read(request.param)


@pytest.fixture(params=LESSONS + SOLUTIONS, ids=name)
def runnable(request):
    return read(request.param)


@pytest.fixture(params=LESSONS + SOLUTIONS + WORKSHEETS, ids=name)
def notebook(request):
    return read(request.param)


def imported(source: str) -> dict[str, str]:
    """The name that code gives to what it imports -> the module that it comes from."""
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)]
    return {
        (alias.asname or alias.name).partition(".")[0]: getattr(node, "module", alias.name)
        for node in nodes
        for alias in node.names
    }


def checks(notebook: nbformat.NotebookNode) -> set[str]:
    """Names of the check functions that a notebook imports."""
    names = [imported(cell.source).items() for cell in code_cells(notebook)]
    return {
        name for pairs in names for name, module in pairs if module.startswith("notebooks.lessons") and "check" in name
    }


def test_it_is_valid_and_holds_no_outputs_or_widget_state(notebook):
    nbformat.validate(notebook)
    assert all(not cell.outputs and cell.execution_count is None for cell in code_cells(notebook))
    assert "widgets" not in notebook.metadata


def test_cells_are_short(runnable):
    sizes = [len(lines_of_code(cell)) for cell in code_cells(runnable)]
    assert statistics.median(sizes) <= 8 and max(sizes) <= 30


def test_cells_are_explained(lesson):
    assert 1 <= len(prose(lesson)) / len(code_cells(lesson)) <= 2


def test_every_code_cell_has_a_sentence_before_and_after_it(lesson):
    kinds = [cell.cell_type for cell in lesson.cells]
    assert kinds[0] == kinds[-1] == "markdown"
    assert ("code", "code") not in list(itertools.pairwise(kinds))


def test_it_has_the_common_skeleton(lesson):
    text = "\n".join(cell.source for cell in prose(lesson))
    for part in ("In this notebook you will", "## 1. Setup", "## What you should see", "## Exercises", "## Next"):
        assert part in text


def test_the_setup_cell_is_the_same_everywhere(notebook):
    first = code_cells(read(QUICKSTART))[0]
    assert code_cells(notebook)[0].source == first.source
    assert len(lines_of_code(first)) <= 10


def test_badges_setup_cells_and_readme_have_the_address_that_pyproject_has(root):
    assert stamp.main(["--check"]) == 0
    repo, tag = stamp.address()
    for path in LESSONS + SOLUTIONS + WORKSHEETS:
        text = read(path).cells[0].source
        assert f"/{repo}/blob/{tag}/notebooks/{path.relative_to(root / 'notebooks').as_posix()}" in text


def test_stamping_changes_everything_and_only_the_address(root, tmp_path, monkeypatch, capsys):
    for name in ("notebooks", "README.md", "pyproject.toml"):
        source = root / name
        shutil.copytree(source, tmp_path / name) if source.is_dir() else shutil.copy(source, tmp_path / name)
    monkeypatch.setattr(stamp, "ROOT", tmp_path)
    assert stamp.main(["--repo", "someone/their-kit", "--tag", "v2"]) == 0
    assert stamp.address() == ("someone/their-kit", "v2") and stamp.main(["--check"]) == 0
    monkeypatch.undo()
    repo, tag = stamp.address()
    for path in (path.relative_to(root) for path in LESSONS + SOLUTIONS + WORKSHEETS):
        changed = (tmp_path / path).read_text(encoding="utf-8")
        assert f"github.com/someone/their-kit/blob/v2/{path.as_posix()}" in changed and repo not in changed
        back = changed.replace("someone/their-kit", repo).replace("blob/v2", f"blob/{tag}")
        assert back.replace('\\"v2\\"', f'\\"{tag}\\"') == (root / path).read_text(encoding="utf-8")


def test_the_readme_lists_the_lessons_and_not_their_copies(root):
    rows = stamp.README_ROW.findall((root / "README.md").read_text(encoding="utf-8"))
    assert [name for _, name in rows] == [path.stem for path in LESSONS]


def test_no_cell_upgrades_or_uses_the_shell(notebook):
    for cell in code_cells(notebook):
        assert not [line for line in cell.source.splitlines() if line.lstrip().startswith(("!", "%"))]
        assert " -U" not in cell.source and "--upgrade" not in cell.source


def test_nothing_heavy_is_imported_before_the_setup(notebook):
    modules = imported(code_cells(notebook)[0].source).values()
    assert {module.partition(".")[0] for module in modules} == {"os", "subprocess", "sys", "pathlib", "helpers"}


def test_every_name_is_defined_before_it_is_used(runnable):
    known = set(dir(builtins)) | {"__name__"}
    for cell in code_cells(runnable):
        nodes = list(ast.walk(ast.parse(cell.source)))
        names = [node for node in nodes if isinstance(node, ast.Name)]
        defined = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.ExceptHandler)]
        known |= {node.id for node in names if isinstance(node.ctx, ast.Store)} | {node.name for node in defined}
        known |= {node.arg for node in nodes if isinstance(node, ast.arg)} | set(imported(cell.source))
        used = {node.id for node in names if isinstance(node.ctx, ast.Load)}
        assert used <= known, f"{used - known} in\n{cell.source}"


def test_it_asks_colab_for_a_t4(notebook):
    assert notebook.metadata["accelerator"] == "GPU" and notebook.metadata["colab"]["gpuType"] == "T4"


def test_the_quickstart_is_about_fifty_lines():
    _, *cells = code_cells(read(QUICKSTART))  # the first cell is the same in every notebook and fetches the kit
    assert sum(len(lines_of_code(cell)) for cell in cells) <= 52


@pytest.mark.parametrize("path", LESSONS[1:], ids=name)
def test_a_lessons_exercises_can_be_checked_and_are_solved(path):
    asked = checks(read(path))
    assert len(asked) >= 3, "three exercises: easy, medium, hard"
    solution = read(path.parent / "solutions" / path.name)
    assert asked <= checks(solution)


def test_no_other_notebook_file_is_forgotten(root):
    tracked = {path for path in (root / "notebooks").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts}
    assert tracked == {*LESSONS, *SOLUTIONS, *WORKSHEETS}
    assert {path.name for path in SOLUTIONS + WORKSHEETS} <= {path.name for path in LESSONS}
    for path in tracked:
        json.loads(path.read_text(encoding="utf-8"))

"""What every notebook must keep to. Needs no torch; reads the files only."""

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

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").rglob("[0-9][0-9]_*.ipynb"))


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    return nbformat.read(request.param, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def lines_of_code(cell):
    return [line for line in cell.source.splitlines() if line.strip() and not line.strip().startswith("#")]


def test_there_are_notebooks():
    assert NOTEBOOKS


def test_it_is_valid_and_holds_no_outputs_or_widget_state(notebook):
    nbformat.validate(notebook)
    assert all(not cell.outputs and cell.execution_count is None for cell in code_cells(notebook))
    assert "widgets" not in notebook.metadata


def test_every_cell_parses(notebook):
    for cell in code_cells(notebook):
        ast.parse(cell.source)


def test_cells_are_short_and_explained(notebook):
    sizes = [len(lines_of_code(cell)) for cell in code_cells(notebook)]
    prose = [cell for cell in notebook.cells if cell.cell_type == "markdown"]
    assert statistics.median(sizes) <= 8 and max(sizes) <= 30
    assert 1 <= len(prose) / len(sizes) <= 2


def test_every_code_cell_has_a_sentence_before_and_after_it(notebook):
    kinds = [cell.cell_type for cell in notebook.cells]
    assert kinds[0] == kinds[-1] == "markdown"
    assert ("code", "code") not in list(itertools.pairwise(kinds))


def test_it_has_the_common_skeleton(notebook):
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    for part in ("In this notebook you will", "## 1. Setup", "## What you should see", "## Exercises", "## Next"):
        assert part in text


def test_the_setup_cell_is_the_same_everywhere(notebook):
    first = code_cells(nbformat.read(NOTEBOOKS[0], as_version=4))[0]
    assert code_cells(notebook)[0].source == first.source
    assert len(lines_of_code(first)) <= 10


def test_badges_setup_cells_and_readme_have_the_address_that_pyproject_has(root):
    assert stamp.main(["--check"]) == 0
    repo, tag = stamp.address()
    for path in NOTEBOOKS:
        text = nbformat.read(path, as_version=4).cells[0].source
        assert f"/{repo}/blob/{tag}/notebooks/{path.relative_to(root / 'notebooks').as_posix()}" in text


def test_stamping_changes_everything_and_only_the_address(root, tmp_path, monkeypatch, capsys):
    for name in ("notebooks", "README.md", "pyproject.toml"):
        source = root / name
        shutil.copytree(source, tmp_path / name) if source.is_dir() else shutil.copy(source, tmp_path / name)
    monkeypatch.setattr(stamp, "ROOT", tmp_path)
    assert stamp.main(["--repo", "someone/their-kit", "--tag", "v2"]) == 0
    assert stamp.address() == ("someone/their-kit", "v2") and stamp.main(["--check"]) == 0
    changed = (tmp_path / "notebooks" / "00_quickstart.ipynb").read_text(encoding="utf-8")
    assert "github.com/someone/their-kit" in changed and "OWNER" not in changed
    monkeypatch.undo()
    repo, tag = stamp.address()
    assert changed.replace("someone/their-kit", repo).replace("blob/v2", f"blob/{tag}").replace('\\"v2\\"', f'\\"{tag}\\"') == (
        root / "notebooks" / "00_quickstart.ipynb"
    ).read_text(encoding="utf-8")


def test_no_cell_upgrades_or_uses_the_shell(notebook):
    for cell in code_cells(notebook):
        assert not [line for line in cell.source.splitlines() if line.lstrip().startswith(("!", "%"))]
        assert " -U" not in cell.source and "--upgrade" not in cell.source


def test_nothing_heavy_is_imported_before_the_setup(notebook):
    imported = {
        (node.module if isinstance(node, ast.ImportFrom) else alias.name).partition(".")[0]
        for node in ast.walk(ast.parse(code_cells(notebook)[0].source))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    }
    assert imported == {"os", "subprocess", "sys", "pathlib", "helpers"}


def test_every_name_is_defined_before_it_is_used(notebook):
    known = set(dir(builtins)) | {"__name__"}
    for cell in code_cells(notebook):
        tree = ast.parse(cell.source)
        stored = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        stored |= {(alias.asname or alias.name).partition(".")[0] for node in ast.walk(tree)
                   if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names}  # fmt: skip
        stored |= {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        stored |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
        used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
        assert used <= known | stored, f"{used - known - stored} in\n{cell.source}"
        known |= stored


def test_it_asks_colab_for_a_t4(notebook):
    assert notebook.metadata["accelerator"] == "GPU" and notebook.metadata["colab"]["gpuType"] == "T4"


def test_the_quickstart_is_about_fifty_lines():
    quickstart = nbformat.read(next(path for path in NOTEBOOKS if path.stem == "00_quickstart"), as_version=4)
    _, *cells = code_cells(quickstart)  # the first cell is the same in every notebook and fetches the kit
    assert sum(len(lines_of_code(cell)) for cell in cells) <= 52


def test_no_other_notebook_file_is_forgotten(root):
    tracked = {path for path in (root / "notebooks").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts}
    assert tracked == set(NOTEBOOKS)
    for path in tracked:
        json.loads(path.read_text(encoding="utf-8"))

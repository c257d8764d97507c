"""What every notebook must keep to. Needs no torch; reads the files only."""

import ast
import itertools
import json
import statistics
from pathlib import Path

import nbformat
import pytest

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


def test_it_asks_colab_for_a_t4(notebook):
    assert notebook.metadata["accelerator"] == "GPU" and notebook.metadata["colab"]["gpuType"] == "T4"


def test_the_quickstart_is_about_fifty_lines():
    quickstart = nbformat.read(next(path for path in NOTEBOOKS if path.stem == "00_quickstart"), as_version=4)
    assert sum(len(lines_of_code(cell)) for cell in code_cells(quickstart)) <= 55


def test_no_other_notebook_file_is_forgotten(root):
    tracked = {path for path in (root / "notebooks").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts}
    assert tracked == set(NOTEBOOKS)
    for path in tracked:
        json.loads(path.read_text(encoding="utf-8"))

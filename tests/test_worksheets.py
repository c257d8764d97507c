"""The worksheet edition: made from the lessons by a command, and current. Needs no torch."""

import ast
import shutil

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell

from tools import stamp, worksheets
from tools.course import LINK, code_cells, lessons, prose

LESSON = [
    new_markdown_cell("# 01 Halves\n\nIn this notebook you will halve. Words: [glossary](GLOSSARY.md)."),
    new_code_cell("setup = 1\nprint(setup)"),
    new_markdown_cell("## 2. The earlier notebooks in one cell\n\nThis loads what came before."),
    new_code_cell("whole = 10\nprint(whole)"),
    new_markdown_cell("## 3. Choose"),
    new_code_cell("STEPS = 12  # on a GPU: 100\nprint(STEPS)"),
    new_markdown_cell(
        "## 4. Halve\n\nSee [lesson 02](02_thirds.ipynb#why), [the solutions](solutions/01_halves.ipynb), [a page](https://example.org/a_b)."
    ),
    new_code_cell(
        "import math\n\n# half of it, rounded\ndef half(x, digits=0):\n    return round(x / 2, digits)\n\nresult = half(whole)\n"
        "unused = math.pi\nprint(result)"
    ),
    new_markdown_cell("The number is half of the first."),
    new_code_cell("\n".join(f"row_{n} = {n}" for n in range(13))),
    new_markdown_cell("## Exercises\n\nHalve it twice."),
    new_code_cell("answer = None  # your turn"),
    new_code_cell("from notebooks.lessons.halves import check_twice\n\ncheck_twice(answer, half, result)"),
    new_markdown_cell("## Next"),
]


@pytest.fixture
def course(tmp_path, root, monkeypatch):
    """A course of two lessons in a folder of its own."""
    (tmp_path / "notebooks").mkdir()
    shutil.copy(root / "pyproject.toml", tmp_path)
    for name, cells in {"00_quickstart": LESSON[:2], "01_halves": LESSON, "02_thirds": LESSON[:2]}.items():
        notebook = nbformat.v4.new_notebook(cells=[nbformat.from_dict(cell) for cell in cells])
        nbformat.write(notebook, tmp_path / "notebooks" / f"{name}.ipynb")
    monkeypatch.setattr(stamp, "ROOT", tmp_path)
    return tmp_path / "notebooks"


@pytest.fixture
def sheet(course):
    assert worksheets.main([]) == 0
    return nbformat.read(course / "worksheets" / "01_halves.ipynb", as_version=4)


def test_the_learner_types_the_steps_and_nothing_else(sheet):
    sources = [cell.source for cell in code_cells(sheet)]
    lesson = [cell.source for cell in LESSON if cell.cell_type == "code"]
    emptied = [position for position, source in enumerate(sources) if source != lesson[position]]
    assert emptied == [3]  # not: setup, catch-up, budget; the long cell; the exercise and its check
    assert sources[3] == "import math\n\n# Your code: about 5 lines. Later cells use: half(x, digits=0), result\n"


def test_prose_stays_and_links_lead_where_they_led(sheet, course):
    text = "\n".join(cell.source for cell in prose(sheet))
    assert "# 01 Halves (worksheet)" in text and "The number is half of the first." in text
    assert "blob/v1/notebooks/worksheets/01_halves.ipynb" in text and "[lesson 01](../01_halves.ipynb)" in text
    links = "../GLOSSARY.md 02_thirds.ipynb#why ../solutions/01_halves.ipynb https://example.org/a_b"
    assert set(links.split()) <= set(LINK.findall(text))
    assert not (course / "worksheets" / "00_quickstart.ipynb").exists()


def test_a_tag_has_the_last_word(course):
    path = course / "01_halves.ipynb"
    lesson = nbformat.read(path, as_version=4)
    code_cells(lesson)[3].metadata["tags"], code_cells(lesson)[4].metadata["tags"] = ["keep"], ["empty"]
    nbformat.write(lesson, path)
    sheet = nbformat.reads(worksheets.worksheet(path), as_version=4)
    assert "def half" in code_cells(sheet)[3].source and code_cells(sheet)[4].source.startswith("# Your code")


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("model = wrap(model)", {"wrap", "model"}),
        ("for name in names:\n    print(name)", {"names", "print"}),
        ("total = 0\nfor n in [1]:\n    total += n * factor", {"factor"}),
        ("rows = [x + shift for x in data]", {"shift", "data"}),
        ("def f(a, b=start):\n    c = a\n    return c + d", {"start", "d"}),
        ("import torch as t\nwith open(path) as file:\n    t.load(file)", {"open", "path"}),
        ("a = b\nb = 1\nc = b + a", {"b"}),
    ],
)
def test_what_a_cell_needs_from_earlier_ones(source, names):
    assert worksheets.needed(source) == names


def test_a_name_that_is_set_anew_is_not_asked_for():
    sources = ("print(kept)", "for i in kept:\n    print(i)", "again = 1", "print(again)")
    cells = [new_code_cell(source) for source in sources]
    assert worksheets.needed_later(cells, {"kept", "i", "again"}) == {"kept"}


def test_the_check_notices_an_edited_lesson_and_a_sheet_without_a_lesson(sheet, course, capsys):
    assert worksheets.main(["--check"]) == 0
    path = course / "01_halves.ipynb"
    lesson = nbformat.read(path, as_version=4)
    lesson.cells[8].source = "It is exactly half."
    nbformat.write(lesson, path)
    shutil.copy(course / "worksheets" / "01_halves.ipynb", course / "worksheets" / "09_gone.ipynb")
    assert worksheets.main(["--check"]) == 1
    said = capsys.readouterr().out
    assert "01_halves.ipynb is not what its lesson gives" in said and "09_gone.ipynb has no lesson" in said
    assert worksheets.main([]) == 0 and worksheets.main(["--check"]) == 0
    assert not (course / "worksheets" / "09_gone.ipynb").exists()


def test_the_worksheets_in_the_repository_are_current():
    assert worksheets.main(["--check"]) == 0


def test_every_lesson_leaves_something_to_type():
    for lesson in filter(worksheets.has_worksheet, lessons()):
        cells = code_cells(nbformat.reads(worksheets.worksheet(lesson), as_version=4))
        gaps = [cell for cell in cells if "# Your code" in cell.source]
        assert len(gaps) >= 3 and len(gaps) >= len(cells) / 4, lesson.name
        for cell in cells:
            ast.parse(cell.source)

"""Which notebooks there are: the lessons, the solutions of their exercises, and their worksheets."""

from __future__ import annotations

import os
import re
from pathlib import Path

import nbformat

ROOT = Path(__file__).parent.parent
NAME = "[0-9][0-9]_*.ipynb"
CHECKS = "notebooks.lessons"  # where the functions are that tell a right answer from a wrong one
CHECK_IMPORT = re.compile(rf"from {re.escape(CHECKS)}\S* import .*\bcheck_")
# Of times and memory, made by tools.lesson_tables.
TABLE = re.compile(r"^\| machine \|.*?(?=\n\n|\Z)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<=\]\()([^)\s]+)(?=\))")


def lessons(root: Path = ROOT) -> list[Path]:
    return sorted((root / "notebooks").glob(NAME))


def solutions(root: Path = ROOT) -> list[Path]:
    return sorted((root / "notebooks" / "solutions").glob(NAME))


def worksheets(root: Path = ROOT) -> list[Path]:
    return sorted((root / "notebooks" / "worksheets").glob(NAME))


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def text(notebook: nbformat.NotebookNode) -> str:
    """The notebook as its file should hold it."""
    return nbformat.writes(notebook) + "\n"


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def prose(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "markdown"]


def lines_of_code(cell: nbformat.NotebookNode) -> list[str]:
    """The lines of a cell that are neither empty nor only a comment."""
    return [line for line in cell.source.splitlines() if line.strip() and not line.strip().startswith("#")]


def relinked(text: str, old_folder: str, new_folder: str) -> str:
    """Markdown from one folder, with its relative links as another folder needs them."""

    def moved(match: re.Match[str]) -> str:
        target, hash_sign, anchor = match[1].partition("#")
        if ":" in target or not target:  # an address, or a place on the same page
            return match[1]
        whole = os.path.normpath(os.path.join(old_folder, target))
        return os.path.relpath(whole, new_folder).replace(os.sep, "/") + hash_sign + anchor

    return LINK.sub(moved, text)

"""How thin is the package? Non-blank lines of Python in each room beside its budget, and what the quickstart's cells import.

    make lines                       # the table; exit status 1 if a room is over its budget

The budgets only ever go down. They count lines as `ruff format` leaves them, at 120 columns.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

from tools import course

# Room -> (most lines now, what we want in the end). A room's files are those of its folder, without its subfolders.
BUDGETS = {
    "helpers": (3665, 3300),
    "helpers/data": (1525, 1150),
    "helpers/dryrun": (680, 680),
    "helpers/panel": (970, 950),
    "helpers/export": (620, 640),
    "notebooks/lessons": (1150, 1150),
}
PACKAGE = (7580, 6400)  # all of helpers/
QUICKSTART = (5260, 4800)  # what the quickstart's cells import, the panel left out
TESTS = (10880, 9000)  # all of tests/
LARGEST_FILE, LARGEST_FUNCTION = 280, 60


def count(path: Path) -> int:
    """Non-blank lines of a file."""
    return sum(bool(line.strip()) for line in path.read_text(encoding="utf-8").splitlines())


def room(folder: str) -> int:
    """Non-blank lines of the Python files in a folder."""
    return sum(map(count, (course.ROOT / folder).glob("*.py")))


def everything(folder: str) -> int:
    """Non-blank lines of the Python files in a folder and in its subfolders."""
    return sum(map(count, (course.ROOT / folder).rglob("*.py")))


def file_of(module: str) -> Path | None:
    """The file of a module of helpers, None if it is none."""
    path = course.ROOT / module.replace(".", "/")
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def imports(source: str) -> set[str]:
    """Modules of helpers that this code imports, inside functions too; not what only a type checker sees."""
    tree = ast.parse(source)
    unseen: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            unseen |= set(ast.walk(node))
    found: set[str] = set()
    for node in ast.walk(tree):
        if node in unseen:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == "helpers":
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if file_of(name) else node.module for name in whole}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.partition(".")[0] == "helpers"}
    return found


def reached(source: str, without: str = "helpers.panel") -> set[Path]:
    """Files of helpers that this code imports, directly or not, and the packages around them."""
    files: set[Path] = set()
    waiting = sorted(imports(source))
    while waiting:
        module = waiting.pop()
        parts = module.split(".")
        for length in range(1, len(parts) + 1):
            name = ".".join(parts[:length])
            file = file_of(name)
            if file and file not in files and not name.startswith(without):
                files.add(file)
                waiting += sorted(imports(file.read_text(encoding="utf-8")))
    return files


def quickstart() -> int:
    """Non-blank lines of what the quickstart's cells import, the panel left out."""
    cells = course.code_cells(course.read(course.ROOT / "notebooks" / "00_quickstart.ipynb"))
    return sum(map(count, reached("\n".join(re.sub(r"^[!%].*$", "", cell.source, flags=re.M) for cell in cells))))


def rows() -> list[tuple[str, int, int, int]]:
    """(what, lines, most lines now, lines wanted in the end)."""
    found = [(f"{folder}/*.py", room(folder), *budget) for folder, budget in BUDGETS.items()]
    found.append(("helpers/ in all", everything("helpers"), *PACKAGE))
    found.append(("imported by the quickstart", quickstart(), *QUICKSTART))
    return [*found, ("tests/ in all", everything("tests"), *TESTS)]


def main() -> int:
    """Print the table."""
    print(f"{'room':<28}{'lines':>7}{'at most':>9}{'wanted':>8}")
    over = 0
    for what, lines, most, wanted in rows():
        over += lines > most
        print(f"{what:<28}{lines:>7}{most:>9}{wanted:>8}{'  over' if lines > most else ''}")
    return int(over > 0)


if __name__ == "__main__":
    sys.exit(main())

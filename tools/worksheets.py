"""Make the worksheet edition: each lesson with its headings and prose, and with empty cells where the learner types the code.

    python -m tools.worksheets               # or: make worksheets; writes notebooks/worksheets/
    python -m tools.worksheets --check       # exit status 1 if a worksheet is not what its lesson gives

What stays: the setup cell, the catch-up cell, the one that loads the model, cells that set the config or a BUDGET in capitals,
every exercise with its check, and cells that are too long to type in a room (above 12 lines: charts, mostly). In all others only
the imports stay, with the names that later cells need. A cell that carries the tag `keep` stays, one with the tag `empty` is
emptied, whatever it holds.
"""

from __future__ import annotations

import argparse
import ast
import sys
from pathlib import Path

import nbformat

from tools import course, stamp

GIVEN_ABOVE = 12  # lines of code: typing more takes a room longer than it teaches
CATCH_UP = "earlier notebooks in one cell"
NOTE = (
    "This is the worksheet of [lesson {number}]({lesson}). Read each step, type its code where a cell says *Your code*, run it, "
    "and compare with what the text below says that you should see. The lesson has the finished cells."
)


def worksheet_path(lesson: Path) -> Path:
    return lesson.parent / "worksheets" / lesson.name


def has_worksheet(lesson: Path) -> bool:
    """The quickstart has none: there, the reader runs everything and types nothing."""
    return not lesson.name.startswith("00_")


def stored(node: ast.AST) -> dict[str, str]:
    """Name -> how to write it, for what code defines at its top level: variables, functions (with arguments), classes."""
    found = {}
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            found[child.name] = f"{child.name}({ast.unparse(child.args)})"
        elif isinstance(child, ast.ClassDef):
            found[child.name] = child.name
        elif isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store):
            found[child.id] = child.id
        elif not isinstance(
            child, (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.Import, ast.ImportFrom)
        ):
            found |= stored(child)
    return found


def needed(source: str) -> set[str]:
    """Names that a cell reads and has not set itself before: what earlier cells must have left."""
    found: set[str] = set()
    own: set[str] = set()
    for statement in ast.parse(source).body:
        names = [node for node in ast.walk(statement) if isinstance(node, ast.Name)]
        read = {node.id for node in names if isinstance(node.ctx, ast.Load)}
        inner = (
            set() if isinstance(statement, (ast.Assign, ast.AugAssign, ast.AnnAssign)) else {n.id for n in names} - read
        )
        inner |= {node.arg for node in ast.walk(statement) if isinstance(node, ast.arg)}
        for node in ast.walk(statement):  # what a loop or a comprehension sets, it sets before it reads it
            if isinstance(node, (ast.For, ast.comprehension)):
                inner |= {name.id for name in ast.walk(node.target) if isinstance(name, ast.Name)}
            elif isinstance(node, ast.withitem) and node.optional_vars is not None:
                inner |= {name.id for name in ast.walk(node.optional_vars) if isinstance(name, ast.Name)}
            elif isinstance(node, ast.FunctionDef):
                inner |= set(stored(node))
        found |= read - inner - own
        own |= set(stored(ast.Module([statement], [])))
        if isinstance(statement, (ast.Import, ast.ImportFrom)):
            own |= {(alias.asname or alias.name).partition(".")[0] for alias in statement.names}
    return found


def needed_later(cells: list[nbformat.NotebookNode], names: set[str]) -> set[str]:
    """Which of `names` the following cells need, before one of them sets the name anew."""
    found, open_names = set(), set(names)
    for cell in cells:
        found |= open_names & needed(cell.source)
        open_names -= set(stored(ast.parse(cell.source)))
    return found


def emptied(source: str, later: set[str]) -> str:
    """The imports of a cell, and a comment in the place of its code: how long it is, and which of its names `later` cells use."""
    tree = ast.parse(source)
    lines = source.splitlines()
    imports = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    size = len([line for line in lines if line.strip() and not line.strip().startswith("#")])
    size -= sum(node.end_lineno - node.lineno + 1 for node in imports)
    needed = [words for name, words in stored(tree).items() if name in later]
    comment = f"# Your code: {'one line' if size == 1 else f'about {size} lines'}."
    if needed:
        comment += f" Later cells use: {', '.join(dict.fromkeys(needed))}"
    kept = [ast.get_source_segment(source, node) for node in imports]
    return "\n".join([*kept, *([""] if kept else []), comment, ""])


def is_kept(cell: nbformat.NotebookNode, text_before: str, section: str, first: bool) -> bool:
    """Does a code cell stay as it is? `section` is the heading that it stands under, `text_before` the cell in front of it."""
    tags = cell.metadata.get("tags", [])
    if "keep" in tags or "empty" in tags:
        return "keep" in tags
    only_imports = all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in ast.parse(cell.source).body)
    names = stored(ast.parse(cell.source))
    sets_config = ("config" in names and "TrainConfig(" in cell.source) or any(
        name.isupper() and len(name) > 1 for name in names
    )
    return (
        first
        or only_imports
        or sets_config
        or section.startswith("Exercises")
        or CATCH_UP in f"{section} {text_before}".lower()
        or course.CHECK_IMPORT.search(cell.source) is not None
        or "your turn" in cell.source.lower()
        or "choose_model(" in cell.source  # loading what the lesson is not about
        or len(course.lines_of_code(cell)) > GIVEN_ABOVE
    )


def worksheet(lesson: Path) -> str:
    """The text of the worksheet's file."""
    notebook = course.read(lesson)
    repo, tag = stamp.address()
    section, first, relative = "", True, f"notebooks/worksheets/{lesson.name}"
    for position, cell in enumerate(notebook.cells):
        if cell.cell_type == "code":
            following = [after for after in notebook.cells[position + 1 :] if after.cell_type == "code"]
            later = needed_later(following, set(stored(ast.parse(cell.source))))
            text_before = notebook.cells[position - 1].source if position else ""
            if not is_kept(cell, text_before, section, first):
                cell.source = emptied(cell.source, later)
            first = False
            continue
        for line in cell.source.splitlines():
            if line.startswith("#"):
                section = line.lstrip("# ")
        cell.source = to_worksheets(cell.source, lesson)
    title, _, rest = notebook.cells[0].source.partition("\n")
    rest = stamp.BADGES.sub("", rest).strip()
    note = NOTE.format(number=lesson.name[:2], lesson=f"../{lesson.name}")
    notebook.cells[0].source = f"{title} (worksheet)\n\n{stamp.badges(relative, repo, tag)}\n\n{note}\n\n{rest}"
    return course.text(notebook)


def to_worksheets(text: str, lesson: Path) -> str:
    """Links as the folder of worksheets needs them; a link to another lesson goes to its worksheet, if it has one."""
    text = course.relinked(text, "notebooks", "notebooks/worksheets")
    for other in course.lessons(lesson.parent.parent):
        if has_worksheet(other):
            text = text.replace(f"](../{other.name}", f"]({other.name}")
    return text


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; say what differs")
    check = parser.parse_args(arguments).check
    texts = {
        worksheet_path(lesson): worksheet(lesson) for lesson in course.lessons(stamp.ROOT) if has_worksheet(lesson)
    }
    stale = [path for path in course.worksheets(stamp.ROOT) if path not in texts]
    differing = [path for path, text in texts.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    for path in [*differing, *stale]:
        words = "has no lesson" if path in stale else "is not what its lesson gives"
        print(
            f"{path.relative_to(stamp.ROOT)} "
            + (f"{words}: run make worksheets" if check else "removed" if path in stale else "written")
        )
        if not check and path in stale:
            path.unlink()
        elif not check:
            path.parent.mkdir(exist_ok=True)
            path.write_text(texts[path], encoding="utf-8")
    return 1 if check and (differing or stale) else 0


if __name__ == "__main__":
    sys.exit(main())

"""The package keeps its shape: arrows between its rooms go one way, and no room grows."""

import ast

import pytest

from tools import course
from tools.lines import LARGEST_FILE, LARGEST_FUNCTION, count, imports, reached, rows

# A module imports only from its own row and from rows above it.
ROWS = [
    ["config", "hardware", "files", "disk", "page"],
    ["setup", "registry", "compat"],
    ["memory", "recipe", "hub", "weights"],
    ["dryrun"],
    ["plan", "planner"],
    ["menu"],
    ["data"],
    ["checkpoints", "runs", "diagnosis", "plots"],
    ["models"],
    ["callbacks", "live", "trainer", "guards", "train", "metrics"],
    ["evaluation"],
    ["export"],
    ["panel"],
]
ROW_OF = {name: number for number, row in enumerate(ROWS) for name in row}
FILES = sorted((course.ROOT / "helpers").rglob("*.py"))
WITHOUT_TORCH = ["config", "hardware", "registry", "memory", "recipe", "planner", "menu", "diagnosis", "setup"]


def name_of(path):
    return ".".join(path.relative_to(course.ROOT).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_arrows_go_one_way(path):
    name = name_of(path)
    own = name.split(".")[1] if "." in name else None
    for imported in imports(path.read_text(encoding="utf-8")):
        room = imported.split(".")[1]
        assert own is None or ROW_OF[room] <= ROW_OF[own], f"{name} imports {imported}"


def test_lessons_import_helpers_and_never_the_reverse():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            module = getattr(node, "module", None) or ""
            assert not (isinstance(node, ast.ImportFrom) and module.startswith("notebooks")), path


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_deciding_needs_no_torch(name):
    heavy = {"torch", "transformers", "peft", "trl", "datasets", "bitsandbytes", "accelerate"}
    for path in reached(f"import helpers.{name}"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in tree.body:  # what a function imports is imported when it is called
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not heavy & {module.partition(".")[0] for module in modules}, path


def test_no_room_grows():
    assert [f"{what}: {lines} lines, at most {most}" for what, lines, most, _ in rows() if lines > most] == []


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_and_functions_are_short(path):
    assert count(path) <= LARGEST_FILE
    lines = path.read_text(encoding="utf-8").splitlines()
    for node in ast.walk(ast.parse("\n".join(lines))):
        if isinstance(node, ast.FunctionDef):
            assert sum(bool(line.strip()) for line in lines[node.lineno - 1 : node.end_lineno]) <= LARGEST_FUNCTION, (
                node.name
            )


PRIVATE = {"helpers.compat", "helpers.dryrun"}


@pytest.mark.parametrize("path", [path for path in FILES if not name_of(path).startswith(tuple(PRIVATE))], ids=name_of)
def test_private_names_of_libraries_are_taken_in_two_places_only(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] != "helpers":
            names = [*node.module.split("."), *(alias.name for alias in node.names)]
            assert not [name for name in names if name.startswith("_") and not name.startswith("__")], node.lineno


def test_the_formatter_is_switched_off_nowhere():
    marks = ("fmt: " + "skip", "fmt: " + "off")
    sources = [path.read_text(encoding="utf-8") for path in course.ROOT.glob("[bhnt]*/**/*.py")]
    assert sum(source.count(mark) for source in sources for mark in marks) <= 5

"""Every relative link in the README, the course's pages and the notebooks leads somewhere. No network, no torch."""

import re
from pathlib import Path

import nbformat
import pytest

from tools.course import LINK, ROOT, lessons, prose, solutions, worksheets

FENCED = re.compile(r"^(```|~~~).*?^\1", re.DOTALL | re.MULTILINE)
HEADING = re.compile(r"^#{1,6}\s+(.+?)\s*#*$", re.MULTILINE)
PAGES = [ROOT / "README.md", *sorted((ROOT / "notebooks").glob("*.md")), *lessons(), *solutions(), *worksheets()]


def text_of(path: Path) -> str:
    """A page's Markdown without its code."""
    if path.suffix == ".ipynb":
        text = "\n\n".join(cell.source for cell in prose(nbformat.read(path, as_version=4)))
    else:
        text = path.read_text(encoding="utf-8")
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^( {4}|\t).*$", "", FENCED.sub("", text), flags=re.MULTILINE))


def anchors(path: Path) -> set[str]:
    """Where a link may lead on a page: GitHub's names of its headings, and in a notebook Jupyter's too."""
    text = path.read_text(encoding="utf-8") if path.suffix != ".ipynb" else ""
    if path.suffix == ".ipynb":
        text = "\n\n".join(cell.source for cell in prose(nbformat.read(path, as_version=4)))
    found: set[str] = set()
    for heading in HEADING.findall(FENCED.sub("", text)):
        words = re.sub(r"[`*]|\]\([^)]*\)|\[", "", heading)
        slug = re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")
        repeated = next(f"{slug}{end}" for end in ["", *(f"-{n}" for n in range(1, 99))] if f"{slug}{end}" not in found)
        found |= {repeated, words.replace(" ", "-")} if path.suffix == ".ipynb" else {repeated}
    return found


def broken(page: Path) -> list[str]:
    """What is wrong with the links of a page, one line each."""
    problems = []
    for link in LINK.findall(text_of(page)):
        target, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        if not target and not anchor:
            problems.append(f"{link!r} is empty")
            continue
        place = (page.parent / target).resolve() if target else page
        if not place.exists():
            problems.append(f"{link} does not exist")
        elif not place.is_relative_to(ROOT) and page.is_relative_to(ROOT):
            problems.append(f"{link} leaves the repository")
        elif anchor and anchor not in anchors(place):
            problems.append(f"{link}: no such heading; there are {sorted(anchors(place))}")
    return problems


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_relative_link_leads_somewhere(page):
    assert broken(page) == []


def test_the_readme_has_links_to_check():
    assert len(LINK.findall(text_of(ROOT / "README.md"))) >= 3


def test_dead_links_are_found(tmp_path):
    (tmp_path / "there.md").write_text("# A `Title`, with [a link](x.md)!\n\n## Twice\n\n## Twice\n")
    page = tmp_path / "page.md"
    page.write_text(
        "[1](there.md) [2](there.md#a-title-with-a-link) [3](there.md#twice-1) [4](https://a.example/b) `[5](gone.md)`\n"
        "```\n[6](gone.md)\n```\n"
    )
    assert broken(page) == []
    page.write_text("[1](gone.md) ![2](there.md#thrice) [3](#nowhere)")
    assert [problem.partition(" ")[0].rstrip(":") for problem in broken(page)] == [
        "gone.md",
        "there.md#thrice",
        "#nowhere",
    ]


def test_every_command_that_the_pages_name_exists():
    """`make` targets and `python -m` modules in README and the course's pages; what they do is tested elsewhere."""
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES if page.suffix == ".md")
    made = set(re.findall(r"(?:`|^ {4,})make ([a-z][\w-]*)", text, re.MULTILINE))
    modules = set(re.findall(r"python -m ((?:helpers|tools|benchmarks|tests)[\w.]*)", text))
    assert len(made) >= 4 and len(modules) >= 6
    assert made <= targets
    assert {name for name in modules if not _module(name)} == set()


def _module(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()

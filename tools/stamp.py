"""Write the repository's address where a reader meets it: badges, the notebooks' first cell, the README.

    make stamp REPO=owner/name TAG=v1          # or: python -m tools.stamp --repo owner/name --tag v1
    python -m tools.stamp --check              # exit status 1 if anything differs from pyproject.toml

pyproject.toml is the one place for the address; everything here is made from it. The tag is what the notebooks clone, so that a
workshop does not change under its audience.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from tools import course

ROOT = course.ROOT
BADGES = re.compile(r"^\[!\[Open in Colab\].*$", re.MULTILINE)
# The last cell of a row is ours.
README_ROW = re.compile(r"^(\| \d\d \| \[[^\]]+\]\(notebooks/(\w+)\.ipynb\) \|.*\|)[^|]*\|$", re.MULTILINE)
BOOTSTRAP = """import os, subprocess, sys
from pathlib import Path
REPO, TAG = "https://github.com/{repo}", "{tag}"
HERE, NAME = Path.cwd(), REPO.rpartition("/")[2]
ROOT = next((f for f in [HERE, *HERE.parents, HERE / NAME] if (f / "helpers").is_dir()), HERE / NAME)
if not ROOT.is_dir():
    subprocess.run([*"git clone -q -c advice.detachedHead=false --depth=1 --branch".split(), TAG, REPO, ROOT], check=True)
os.chdir(ROOT); sys.path.insert(0, str(ROOT))
from helpers.setup import install_what_is_missing
install_what_is_missing()"""


def address() -> tuple[str, str]:
    """(owner/name, tag) as pyproject.toml has them."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return re.search(r'Repository = "https://github\.com/([^"]+)"', text)[1], re.search(
        r'^tag = "([^"]+)"', text, re.MULTILINE
    )[1]


def notebooks() -> list[Path]:
    """Lessons, solutions and worksheets: all of them can be opened from their own badges."""
    return [*course.lessons(ROOT), *course.solutions(ROOT), *course.worksheets(ROOT)]


def badges(path: str, repo: str, tag: str) -> str:
    """Two badges that open one notebook, by its path in the repository."""
    page = f"github.com/{repo}/blob/{tag}/{path}"
    return (
        f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/{page.replace('.com', '', 1)}) "
        f"[![Open in Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)](https://kaggle.com/kernels/welcome?src=https://{page})"
    )


def stamped(repo: str, tag: str) -> dict[Path, str]:
    """File -> its text as it should be."""
    texts = {}
    for path in notebooks():
        notebook = course.read(path)
        relative = path.relative_to(ROOT).as_posix()
        title = notebook.cells[0]
        heading, _, rest = BADGES.sub("", title.source).partition("\n")
        title.source = f"{heading}\n\n{badges(relative, repo, tag)}\n\n{rest.strip()}".strip()
        first = next(cell for cell in notebook.cells if cell.cell_type == "code")
        first.source = BOOTSTRAP.format(repo=repo, tag=tag)
        texts[path] = course.text(notebook)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    texts[ROOT / "README.md"] = README_ROW.sub(
        lambda row: f"{row[1]} {badges(f'notebooks/{row[2]}.ipynb', repo, tag)} |", readme
    )
    return texts


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repo", help="owner/name on GitHub")
    parser.add_argument("--tag", help="the tag that notebooks clone")
    parser.add_argument("--check", action="store_true", help="change nothing; say what differs")
    chosen = parser.parse_args(arguments)
    repo, tag = address()
    if not chosen.check and (chosen.repo or chosen.tag):
        repo, tag = chosen.repo or repo, chosen.tag or tag
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo) or not re.fullmatch(r"[\w./-]+", tag):
            parser.error("REPO must be owner/name, and TAG a tag's name")
        project = ROOT / "pyproject.toml"
        text = re.sub(
            r'(Repository = "https://github\.com/)[^"]+', rf"\g<1>{repo}", project.read_text(encoding="utf-8")
        )
        project.write_text(re.sub(r'^tag = "[^"]+"', f'tag = "{tag}"', text, flags=re.MULTILINE), encoding="utf-8")
    differing = [path for path, text in stamped(repo, tag).items() if path.read_text(encoding="utf-8") != text]
    for path in differing:
        print(
            f"{path.relative_to(ROOT)}: {'differs from pyproject.toml, run make stamp' if chosen.check else 'stamped'}"
        )
        if not chosen.check:
            path.write_text(stamped(repo, tag)[path], encoding="utf-8")
    return 1 if chosen.check and differing else 0


if __name__ == "__main__":
    sys.exit(main())

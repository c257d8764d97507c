"""List the numbers with a unit in the lessons' prose, so that somebody looks at each: does it depend on machine or model?

    python -m tools.prose_numbers            # each number, with its reason, or ? if nobody has looked at it
    python -m tools.prose_numbers --write    # the same into tests/numbers_in_prose.txt, keeping the reasons that are there

A number that a machine or a model decides belongs into a cell that prints it (or into the table at the top, which tools.lesson_tables
makes and which is not listed here). What may stand in prose is listed in that file with one of the `REASONS`;
tests/test_prose_numbers.py fails on a number that is not there. The words around a number are part of its entry, so a changed
sentence has to be looked at again.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from tools import course

LIST = course.ROOT / "tests" / "numbers_in_prose.txt"
REASONS = {
    "definition": "what a format, a rule or simple arithmetic says, on any machine",
    "quoted claim": "a number that others quote, shown beside ours",
    "setting": "a value of the config or of an exercise, which the reader sets",
    "tested": "a test fails if it is not so",
    "ratio": "said roughly, as what to look for beside the printed figure",
}
WORDS = "half an|one|two|three|four|five|six|seven|eight|nine|ten|twelve|fifteen|twenty|thirty|forty|fifty|sixty|ninety|a hundred"
LONG_UNITS = r"per ?cent|milliseconds?|seconds?|minutes?|hours?|[KMGT]i?B|kB|bytes?|megabytes?|gigabytes?|tokens? per second|tokens?/s|times"
UNITS = rf"%|{LONG_UNITS}|ms|s|min|h|[x×](?!\s*\d)"
NUMBER = re.compile(
    rf"(?<![\w.,`/-])(?:~?\d[\d ,.\u00a0]*(?:\s?(?:to|or|[-–])\s?\d[\d.,]*)?[\s\u00a0-]?(?:{UNITS})|(?:{WORDS})[\s-](?:{LONG_UNITS}))(?![\w/])",
    re.IGNORECASE,
)
WORDS_BEFORE, WORDS_AFTER = 4, 3
HEAD = """# Numbers with a unit in the prose of lessons and solutions, each with the reason why it may stand there.
# `python -m tools.prose_numbers --write` brings the list up to date; replace each ? by one of:
""" + "".join(f"#   {name}: {meaning}\n" for name, meaning in REASONS.items())


def fragments(markdown: str) -> list[str]:
    """Each number with a unit in a piece of Markdown, with a few words before and after it. Code and addresses are left out."""
    text = re.sub(r"```.*?```|`[^`\n]*`", "`code`", markdown, flags=re.DOTALL)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    found = []
    for block in re.split(r"\n\s*\n|\n(?=[-*|#])|\|", text):
        block = " ".join(block.split())
        for match in NUMBER.finditer(block):
            first = block.count(" ", 0, match.start())  # the word that the number begins in, and the one it ends in
            last = block.count(" ", 0, match.end())
            found.append(" ".join(block.split(" ")[max(first - WORDS_BEFORE, 0) : last + 1 + WORDS_AFTER]))
    return found


def candidates(root: Path = course.ROOT) -> list[tuple[str, str]]:
    """(notebook, fragment) for each number, in the order of the course."""
    found = []
    for path in [*course.lessons(root), *course.solutions(root)]:
        name = path.relative_to(root / "notebooks").with_suffix("").as_posix()
        for cell in course.prose(course.read(path)):
            found += [(name, fragment) for fragment in fragments(course.TABLE.sub("", cell.source))]
    return list(dict.fromkeys(found))


def reviewed(path: Path = LIST) -> dict[tuple[str, str], str]:
    """(notebook, fragment) -> the reason why it may stand."""
    entries = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        if line and not line.startswith("#"):
            place, _, reason = line.rpartition(" — ")
            name, _, fragment = place.partition(": ")
            entries[name, fragment] = reason
    return entries


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"write {LIST.relative_to(course.ROOT)}")
    write = parser.parse_args(arguments).write
    known = reviewed()
    lines = [f"{name}: {fragment} — {known.get((name, fragment), '?')}" for name, fragment in candidates()]
    if write:
        LIST.write_text(HEAD + "".join(f"{line}\n" for line in lines), encoding="utf-8")
        print(
            f"{len(lines)} numbers, {sum(line.endswith('— ?') for line in lines)} to look at, in {LIST.relative_to(course.ROOT)}"
        )
    else:
        print(*lines, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Keep the glossary in order: entries by the alphabet, each with the lesson that uses its word first.

    python -m tools.glossary             # writes notebooks/GLOSSARY.md anew; you write the entries, this adds the lessons
    python -m tools.glossary --check     # exit status 1 if that would change it

An entry is a paragraph that begins with `**word**:`. A word counts as used where it stands in a lesson's prose, also in the plural.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from tools import course

# Words that the lessons use in another form.
FORMS = {
    "scheduler": "schedule",
    "underfitting": "underfit",
    "overfitting": "overfit",
    "generation": "generate",
    "target modules": "target_modules",
    "sequence length": "max_length",
}
ENTRY = re.compile(r"\*\*(.+?)\*\*: (.*?)(?: First in \[lesson \d\d\]\([^)]*\)\.)?")


def first_lesson(word: str, texts: dict[Path, str]) -> Path | None:
    """The first lesson whose prose uses `word`. Words with capitals must have them there too (T4, LoRA)."""
    word = FORMS.get(word, word)
    ending = r"(?:s|es|ing)?" if word[-1].isalpha() else "s?"
    pattern = re.compile(rf"(?<![\w-]){re.escape(word)}{ending}(?!\w)", 0 if word != word.lower() else re.IGNORECASE)
    return next((lesson for lesson, text in texts.items() if pattern.search(text)), None)


def ordered(glossary: str, texts: dict[Path, str]) -> str:
    """The glossary's text with its entries sorted, and their lessons as they are now."""
    paragraphs = [" ".join(paragraph.split("\n")) for paragraph in glossary.strip().split("\n\n")]
    entries = {match[1]: match[2] for match in map(ENTRY.fullmatch, paragraphs) if match}
    head = [
        paragraph
        for paragraph in glossary.strip().split("\n\n")
        if not ENTRY.fullmatch(" ".join(paragraph.split("\n")))
    ]
    lines = []
    for word in sorted(entries, key=str.casefold):
        lesson = first_lesson(word, texts)
        lines.append(
            f"**{word}**: {entries[word]}" + (f" First in [lesson {lesson.name[:2]}]({lesson.name})." if lesson else "")
        )
    return "\n\n".join([*head, *lines]) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; say whether it is in order")
    check = parser.parse_args(arguments).check
    path = course.ROOT / "notebooks" / "GLOSSARY.md"
    texts = {
        lesson: "\n".join(cell.source for cell in course.prose(course.read(lesson))) for lesson in course.lessons()
    }
    old = path.read_text(encoding="utf-8")
    new = ordered(old, texts)
    if not check:
        path.write_text(new, encoding="utf-8")
    elif new != old:
        print(f"{path.relative_to(course.ROOT)} is not in order: run python -m tools.glossary")
    return 1 if check and new != old else 0


if __name__ == "__main__":
    sys.exit(main())

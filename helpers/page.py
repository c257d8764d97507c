"""Printed text as wide as a notebook's page, so that nothing breaks in the middle of a word."""

from __future__ import annotations

from textwrap import fill

COLUMNS = 104


def filled(mark: str, text: str) -> str:
    """`mark` and `text`, on as many lines as that takes, the later ones indented under the first."""
    later = " " * len(mark)
    return fill(
        text, COLUMNS, initial_indent=mark, subsequent_indent=later, break_long_words=False, break_on_hyphens=False
    )

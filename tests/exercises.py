"""Answers to exercises in tables: `@answers({check: [(answer, words), ...]})` for a test of `said`, `check`, `answer`, `words`.

`words` begin the line that the check prints (Right, Not yet, Your turn), or stand in the hint of a wrong answer.
"""

from collections.abc import Callable
from typing import Any

import pytest

ABSURD = [
    "5",
    b"5",
    True,
    float("nan"),
    float("inf"),
    -1,
    [],
    {},
    [None] * 16,
    ["a"] * 16,
    object(),
    lambda: 0,
    lambda *_: "x",
    lambda *_: None,
    lambda *_: 1 / 0,
]


def answers(table: dict[Callable[..., None], list[tuple[Any, str]]]) -> pytest.MarkDecorator:
    """Each check is also given nothing, which is the learner's turn, and absurd things, which are not right."""
    rows: list[tuple[Any, Any, str]] = []
    for check, given in table.items():
        right = [words for _, words in given if words.startswith("Right")]
        assert right and len(given) - len(right) >= 4, "one right answer at least, and four wrong ones"
        rows += [(check, None, "Your turn"), *((check, answer, "Not yet") for answer in ABSURD)]
        rows += [(check, answer, words) for answer, words in given]
    return pytest.mark.parametrize(("check", "answer", "words"), rows)

"""Words and tables of lesson 03: what damage was done to an answer, and what a run made of it.

side_by_side_answers(clean, noisy, rows=5)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd


def side_by_side_answers(
    clean: Sequence[dict[str, Any]], noisy: Sequence[dict[str, Any]], rows: int = 5
) -> pd.DataFrame:
    """The first `rows` answers that differ, clean and noisy beside each other, with their lines joined by " / "."""
    import pandas as pd

    pairs = [(_answer(one), _answer(other)) for one, other in zip(clean, noisy)]
    chosen = [pair for pair in pairs if pair[0] != pair[1]][:rows]
    return pd.DataFrame(chosen, columns=["clean answer", "what the noisy file says"])


def _answer(example: dict[str, Any]) -> str:
    return example["completion"][0]["content"].replace("\n", " / ")

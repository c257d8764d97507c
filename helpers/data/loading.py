"""Any source in, examples out; what cannot be used is set aside and named."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset

from helpers.data.checks import check_examples
from helpers.data.faults import FAULTS, DataError, Problem
from helpers.data.formats import to_examples

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_examples(
    source: Any,
    rejected: str | Path | None = "rejected.jsonl",
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_length: int | None = None,
    truncate: bool = False,
) -> Dataset:
    """The examples of a source, ready for `split`. Prints nothing if all is well, and one line if not.

    Args:
        source: file, folder, Hub id, DataFrame, `upload()`; see `helpers.data.reading.read`.
        rejected: where rows that cannot be used are written, with reason and fix; None writes nothing.
        tokenizer, max_length, truncate: also check the tokens, as in `check_examples`.

    Raises:
        DataError: there is no such source, or training could not start with what is in it.
    """
    report = check_examples(source, tokenizer, max_length, truncate)
    if not report.counts["kept"] or (report.tokens and not report.ready):
        raise DataError(f"{report.source}: {report.stop}")
    said = []
    if report.rejected:
        where = f" (see {report.save_rejected(rejected)})" if rejected else ""
        said.append(f"{report.counts['rejected']:,} of {report.counts['input']:,} rows set aside{where}")
    if report.warnings:
        said.append(f"worth a look: {', '.join(FAULTS[finding.code].name for finding in report.warnings)}")
    if said:
        print(f"{report.source}: {'; '.join(said)}. print(check_examples(...)) says more.")
    return report.examples


def to_messages(row: dict[str, Any]) -> dict[str, list[dict[str, str]]]:
    """One row as chat messages; `input` (context for the instruction) follows it after an empty line."""
    outcome = to_examples(row)
    if isinstance(outcome, Problem):
        raise DataError(f"This row cannot be used: {outcome.reason}.")
    return outcome[1][-1]

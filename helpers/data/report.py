"""What a check found: counts first, then one line for each finding with the places and the fix.

report = check_examples("my_examples.csv")
print(report)
report.save_rejected("rejected.jsonl")
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.data.issues import FAULTS, is_broken
from helpers.page import filled

if TYPE_CHECKING:
    import pandas as pd
    from datasets import Dataset

    from helpers.data.tokens import TokenCheck

PLACES = 5  # places named for each finding
SMALL, ENOUGH = (
    50,
    500,
)  # examples: below, even a style is hard to learn; from here on, a first training is worth its time


class Place(tuple):
    """(file, line), printed as short as it stays clear."""

    __slots__ = ()

    def show(self, only_file: bool) -> str:
        return f"{self[1]}" if only_file else f"{Path(self[0]).name}:{self[1]}"


@dataclass
class Finding:
    """One kind of mistake: how often, where first, and what it looks like there."""

    code: str
    count: int = 0
    places: list[Place] = field(default_factory=list)
    detail: str = ""
    of_one_row: bool = True
    """Does `detail` describe the first row, and not all of them together?"""

    def add(self, place: Place, detail: str = "") -> None:
        self.count += 1
        if len(self.places) < PLACES:
            self.places.append(place)
        self.detail = self.detail or detail

    @property
    def rejects(self) -> bool:
        return FAULTS[self.code].rejects


@dataclass(repr=False)
class Report:
    """Everything `check_examples` found out about a source."""

    source: str
    examples: Dataset
    """Ready for TRL: `prompt` and `completion` messages, or `text`; and `group`, which examples of one conversation share."""
    rejected: list[dict[str, Any]] = field(default_factory=list)
    """Rows set aside: file, line, fault, reason, fix, record."""
    counts: dict[str, int] = field(default_factory=dict)
    """input (records read) = kept + rejected; examples (one for each answer)."""
    findings: dict[str, Finding] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    tokens: TokenCheck | None = None
    stop: str = ""
    """Why training could not start, although there are examples."""

    @property
    def ready(self) -> bool:
        """Could training start with what is left?"""
        return not self.stop

    @property
    def warnings(self) -> list[Finding]:
        """Findings about rows that were kept."""
        return [finding for finding in self.findings.values() if not finding.rejects]

    def save_rejected(self, path: str | Path = "rejected.jsonl") -> Path:
        """Write the rows that were set aside, each with its place, the reason and the fix, as JSON lines."""
        path = Path(path)
        with path.open("w", encoding="utf-8", newline="\n") as stream:
            for row in self.rejected:
                stream.write(_as_json(row) + "\n")
        return path

    def __str__(self) -> str:
        c = self.counts
        several = f" as {c['examples']:,} examples" if c["examples"] != c["kept"] else ""
        lines = [f"{self.source}: {c['input']:,} rows read, {c['kept']:,} kept{several}, {c['rejected']:,} set aside"]
        lines.append("Training could start." if self.ready else f"Training cannot start: {self.stop}")
        only_file = len({place[0] for finding in self.findings.values() for place in finding.places}) < 2
        for title, rejects in (("Set aside", True), ("Kept, worth a look", False)):
            chosen = sorted(
                (f for f in self.findings.values() if f.rejects == rejects), key=lambda finding: -finding.count
            )
            if chosen:
                lines += ["", f"{title}:"]
            for finding in chosen:
                places = ", ".join(place.show(only_file) for place in finding.places) + (
                    ", ..." if finding.count > PLACES else ""
                )
                where = ("line " if finding.count == 1 else "lines ") + places if only_file else places
                fault = FAULTS[finding.code]
                first = "first: " if finding.count > 1 and finding.of_one_row else ""
                detail = f": {first}{finding.detail}" if finding.detail else ""
                lines.append(filled(f"  {finding.count:>6,}  ", f"{fault.name} ({where}){detail}. {fault.fix}"))
        lines += [""] + [filled("  - ", note) for note in self.notes]
        return "\n".join(lines)

    __repr__ = __str__  # so that a cell may simply end with the report

    def table(self, rows: int = 5) -> pd.DataFrame:
        """The first examples as a table, long texts shortened."""
        return examples_table(self.examples, rows)


def examples_table(examples: Dataset, rows: int = 5, width: int = 200) -> pd.DataFrame:
    """The first `rows` examples as a table to look at: what was said last, the answer, and how many turns came before."""
    import pandas as pd

    chosen = list(examples.select(range(min(rows, len(examples)))))
    if "text" in examples.column_names:
        return pd.DataFrame({"text": [_short(example["text"], width) for example in chosen]})
    return pd.DataFrame(
        {
            "system": [
                _short(x["prompt"][0]["content"], width) if x["prompt"][0]["role"] == "system" else "" for x in chosen
            ],
            "earlier turns": [sum(message["role"] != "system" for message in x["prompt"]) - 1 for x in chosen],
            "question": [_short(x["prompt"][-1]["content"], width) for x in chosen],
            "answer": [_short(x["completion"][-1]["content"], width) for x in chosen],
        }
    )


def advice(examples: int) -> str:
    """How far a number of examples goes, in one sentence."""
    if examples < SMALL:
        return f"{examples} examples are enough to try the code, hardly to learn from: write 50 to 100 for a style, 500 for a first real run."
    if examples < ENOUGH:
        return f"{examples} examples can teach a style or a format; 500 are enough for a first real run, and good ones beat many."
    return f"{examples:,} examples are enough to start (500 are); hold 10 to 20 % of them out with split()."


def _short(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."


def _as_json(row: dict[str, Any]) -> str:
    """One row as a line of JSON, whatever it holds: dates and bytes as text, half characters escaped, and if need be as plain text."""
    for record in (row["record"], str):
        try:
            whole = row | {"record": repr(row["record"]) if record is str else record}
            line = json.dumps(whole, ensure_ascii=False, default=str)
            return json.dumps(whole, default=str) if is_broken(line) else line
        except (TypeError, ValueError, RecursionError):  # keys that are no text, a list that contains itself
            continue
    return json.dumps(row | {"record": None}, default=str)

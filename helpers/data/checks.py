"""Check a data set before any minute of training is spent on it: what can be used, what cannot and why, what to look at.

    report = check_examples("my_examples.jsonl", tokenizer, max_length=512)
    print(report)
    report.examples, report.rejected, report.ready

Nothing is dropped silently: every record that was read is either kept or in `report.rejected`, with the reason and the fix. Records go
through in batches, so that besides the examples themselves only a few numbers per record are held in memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

from datasets import Dataset, Features, Value, concatenate_datasets

from helpers.data.content import suspicions
from helpers.data.faults import FAULTS, DataError, Problem
from helpers.data.files import Record
from helpers.data.formats import TEXT, texts_of, used_columns
from helpers.data.overview import Overview
from helpers.data.reading import name_of, read
from helpers.data.report import PLACES, Finding, Place, Report, advice
from helpers.data.rows import Row, to_row
from helpers.data.token_check import MASKED, TokenCheck
from helpers.data.tokens import ensure_chat_template, tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH = 1000  # records looked at together; the form of most of the first batch is the form of the data set
MESSAGES = [{"role": Value("string"), "content": Value("string")}]
FEATURES = {
    "chat": Features({"prompt": MESSAGES, "completion": MESSAGES, "group": Value("int64")}),
    TEXT: Features({"text": Value("string"), "group": Value("int64")}),
}


def check_examples(
    source: Any,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_length: int | None = None,
    truncate: bool = False,
    validation: Any = None,
) -> Report:
    """Read a source, set aside what cannot be used, and say what else is worth a look.

    Args:
        source: whatever `helpers.data.reading.read` takes: file, folder, Hub id, DataFrame, upload, list of dicts.
        tokenizer: the model's; without it, everything that depends on tokens is skipped, and the report says so.
        max_length: tokens of the longest example that will be trained. Answers that would be cut are set aside ...
        truncate: ... unless this is True: then they are kept, and trained without their end.
        validation: a second source that you keep for validation, to find examples that stand in both.

    Raises:
        DataError: the source as a whole cannot be read.
    """
    check = _Check(tokenizer, max_length, truncate)
    if validation is not None:
        check.note_held_out(read(validation))
    records = read(source)
    while batch := list(islice(records, BATCH)):
        check.look(batch)
    return check.report(name_of(source))


class _Check:
    """The state of one check: what was kept and found so far."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, max_length: int | None, truncate: bool) -> None:
        self.max_length, self.truncate = max_length, truncate
        self.form = ""
        self.read = self.kept = 0
        self.parts: list[Dataset] = []
        self.rejected: list[dict[str, Any]] = []
        self.findings: dict[str, Finding] = {}
        self.first_with: dict[
            bytes, tuple[Place, bool]
        ] = {}  # digest of what a row says -> where it stood first, and in which part
        self.overview = Overview()
        self.unused: Counter[str] = Counter()
        self.notes: list[str] = []
        self.tokens = TokenCheck(tokenizer, max_length) if tokenizer is not None else None
        if tokenizer is not None and ensure_chat_template(tokenizer):
            self.notes.append(
                "the tokenizer had no chat template, as base models do: it was given a plain one (### Question, ### Answer)"
            )

    def note_held_out(self, records: Iterator[Record]) -> None:
        """Remember a validation source, without keeping or judging it."""
        for record in records:
            row = to_row(record)
            if isinstance(row, Row):
                self.first_with.setdefault(row.digest, (row.place, True))
                self.overview.add(row.examples, row.place, held_out=True, counts=False)

    def look(self, batch: list[Record]) -> None:
        """One batch of records, through one check after the other; what comes out at the end is kept."""
        self.read += len(batch)
        rows = [row for record in batch if (row := self._row(record))]
        if rows and not self.form:
            self.form = Counter(row.form for row in rows).most_common(1)[0][0]
        rows = [row for row in rows if self._has_form(row) and self._is_new(row)]
        if self.tokens and rows:
            rows = self._that_fit(rows)
        if not rows:
            return
        columns: dict[str, list[Any]] = {name: [] for name in FEATURES[self.form]}
        for row in rows:
            for example in row.examples:
                for name in columns:
                    columns[name].append(self.kept if name == "group" else example[name])
            self.overview.add(row.examples, row.place, row.held_out)
            self._inspect(row)
            self.kept += 1
        self.parts.append(Dataset.from_dict(columns, features=FEATURES[self.form]))

    def _row(self, record: Record) -> Row | None:
        """The record as examples, if it can be used."""
        row = to_row(record)
        if isinstance(row, Problem):
            self._set_aside(record, row)
            return None
        return row

    def _has_form(self, row: Row) -> bool:
        if row.form != self.form:
            this, others = (
                ("plain text", "questions with answers")
                if row.form == TEXT
                else ("a question with an answer", "plain text")
            )
            self._set_aside(row.record, Problem("other form", f"this is {this}, most rows are {others}"))
        return row.form == self.form

    def _is_new(self, row: Row) -> bool:
        here, held_out, digest = row.place, row.held_out, row.digest
        if digest not in self.first_with:
            self.first_with[digest] = (here, held_out)
            return True
        there, there_held_out = self.first_with[digest]
        if held_out != there_held_out:
            self._found("leak", row.record)
        where = f"line {there[1]}" if there[0] == here[0] else f"{there[0]}, line {there[1]}"
        self._set_aside(row.record, Problem("duplicate", f"the same as {where}"))
        return False

    def _that_fit(self, rows: list[Row]) -> list[Row]:
        """The rows whose answers the sequence length holds whole (or, with `truncate`, at least in part)."""
        every = Dataset.from_list([example for row in rows for example in row.examples])
        try:
            tokens = iter(tokenize(every, self.tokens.tokenizer))
        except DataError:  # the chat template refuses at least one: find out which
            rows = [row for row in rows if self._is_accepted(row)]
            return self._that_fit(rows) if rows else []
        kept = []
        for row in rows:
            own = [next(tokens) for _ in row.examples]
            self.tokens.lengths += [len(example.ids) for example in own]
            longest = max(len(example.ids) for example in own)
            too_long = self.max_length is not None and longest > self.max_length
            cut = f"{longest:,} tokens, {longest - (self.max_length or 0):,} more than max_length {self.max_length}"
            if any(max(example.labels[: self.max_length], default=MASKED) == MASKED for example in own):
                self._set_aside(
                    row.record, Problem("nothing left", f"no token of an answer would be trained ({longest:,} tokens)")
                )
            elif too_long and not self.truncate:
                self._set_aside(row.record, Problem("too long", cut))
            else:
                if too_long:
                    self._found("cut", row.record, cut)
                for example, example_tokens in zip(row.examples, own):
                    self.tokens.add(example, example_tokens, f"line {row.record.line}")
                kept.append(row)
        return kept

    def _is_accepted(self, row: Row) -> bool:
        try:
            tokenize(Dataset.from_list(row.examples), self.tokens.tokenizer)
        except DataError as error:
            self._set_aside(row.record, Problem("template", str(error)))
            return False
        return True

    def _inspect(self, row: Row) -> None:
        """What is suspicious in a row that is kept."""
        seen: dict[str, str] = {}
        for text in texts_of(row.examples[-1]):
            seen |= suspicions(text)
        for code, what in seen.items():
            self._found(code, row.record, what)
        if isinstance(row.record.value, dict):
            self.unused.update({str(name) for name in row.record.value} - used_columns(row.record.value))

    def _set_aside(self, record: Record, problem: Problem) -> None:
        fault = FAULTS[problem.code]
        self._found(problem.code, record, problem.reason)
        self.rejected.append(
            {
                "file": record.file,
                "line": record.line,
                "fault": fault.name,
                "reason": problem.reason,
                "fix": fault.fix,
                "record": record.value,
            }
        )

    def _found(self, code: str, record: Record, detail: str = "") -> None:
        self.findings.setdefault(code, Finding(code)).add(Place((record.file, record.line)), detail)

    def report(self, source: str) -> Report:
        """Everything that was found, once all records went through."""
        form = self.form or "chat"
        empty = Dataset.from_dict({name: [] for name in FEATURES[form]}, features=FEATURES[form])
        examples = concatenate_datasets(self.parts) if self.parts else empty
        for finding in self.overview.findings():
            known = self.findings.setdefault(finding.code, finding)
            if known is not finding:
                known.count += finding.count
                known.places = (known.places + finding.places)[:PLACES]
        if form == TEXT:
            self.notes.append("plain text: the loss counts every token, not only answers")
        if unused := [repr(name) for name, _ in self.unused.most_common(8) if name]:
            self.notes.append(f"columns that are not trained on: {', '.join(unused)}")
        if self.tokens is None:
            self.notes.append("tokens were not checked: name the model (tokenizer=..., or --model on the command line)")
        else:
            self.notes += str(self.tokens).splitlines()
        if len(examples):
            self.notes.append(advice(len(examples)))
        return Report(
            source,
            examples,
            self.rejected,
            {"input": self.read, "kept": self.kept, "rejected": len(self.rejected), "examples": len(examples)},
            self.findings,
            self.notes,
            self.tokens,
            self._stop(),
        )

    def _stop(self) -> str:
        if not self.read:
            return "there is no row in it. Choose the file that holds your examples."
        if not self.kept:
            worst = max(self.findings.values(), key=lambda finding: finding.count)
            return f"no row can be used. {worst.detail} (line {worst.places[0][1]}). {FAULTS[worst.code].fix}"
        if self.kept < 2:
            return "one row is too few to train on and to hold one out. Add examples."
        return (self.tokens.stop() or "") if self.tokens else ""

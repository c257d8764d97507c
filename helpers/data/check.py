"""Check a data set before any minute of training is spent on it: what can be used, what cannot and why.

    report = check_examples("my_examples.jsonl", tokenizer, max_length=512)
    print(report)
    report.examples, report.rejected, report.ready
    examples = load_examples("my_examples.jsonl")       # the same check, said in one line

Nothing is dropped silently: every record that was read is either kept or set aside, with the reason and the fix.
Records go through in batches, so that besides the examples only a few numbers per record are held in memory.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, Value, concatenate_datasets

from helpers.config import noted
from helpers.data.convert import CHAT, TEXT, Example, texts_of, to_examples, used_columns
from helpers.data.issues import ISSUE_TYPES, PLACES, DataError, Finding, Issue, Place, Report, as_json, suspicions, tell
from helpers.data.parse import BATCH, Record
from helpers.data.read import name_of, part_of, read
from helpers.data.splitting import MinHashIndex
from helpers.data.tokens import MASKED, TokenCheck, control_tokens, ensure_chat_template, tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_REJECTED = 64 * 2**20  # characters of the rows set aside that are kept, to be written to a file
REPEATED, REPEATED_SHARE = 5, 0.01  # an answer counts as repeated from 5 times and 1 % of the rows on
ENOUGH_FOR = {  # so many examples
    500: "to start (500 are); hold 10 to 20 % of them out with split().",
    50: "for a style or a format; 500 are for a first real run, and good ones beat many.",
    1: "to try the code, hardly to learn from: 50 to 100 teach a style, 500 are a first real run.",
}
MESSAGES = [{"role": Value("string"), "content": Value("string")}]
FEATURES = {
    CHAT: Features({"prompt": MESSAGES, "completion": MESSAGES, "group": Value("int64")}),
    TEXT: Features({"text": Value("string"), "group": Value("int64")}),
}


def check_examples(
    source: Any,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_length: int | None = None,
    truncate: bool = False,
) -> Report:
    """Read a source, set aside what cannot be used, and say what else is worth a look.

    Args:
        source: whatever `helpers.data.read.read` takes: file, folder, Hub id, DataFrame, list of dicts.
        tokenizer: the model's; without it, everything that depends on tokens is skipped, and the report says so.
        max_length: tokens of the longest example that will be trained. Answers that would be cut are set aside ...
        truncate: ... unless this is True: then they are kept, and trained without their end.

    Raises DataError if the source as a whole cannot be read.
    """
    check = _Check(tokenizer, max_length, truncate)
    records = read(source)
    while batch := list(islice(records, BATCH)):
        check.add(batch)
    report = check.report(name_of(source))
    noted(report.examples, **({"data": str(Path(source).resolve())} if isinstance(source, str | Path) else {}))
    return report


def load_examples(
    source: Any, rejected: str | Path | None = "rejected.jsonl", tokenizer: PreTrainedTokenizerBase | None = None
) -> Dataset:
    """The examples of a source, ready for `split`. Prints nothing if all is well, and one line if not.

    Rows that cannot be used are written to the file `rejected`, with reason and fix; None writes nothing. A tokenizer sets those
    aside too that only it cannot use. Raises DataError if there is no such source, or nothing in it can be used.
    """
    report = check_examples(source, tokenizer)
    if not report.counts["kept"]:
        raise DataError(f"{report.source}: {report.stop}")
    said = []
    if report.rejected:
        where = f" ({report.written(rejected)})" if rejected else ""
        said.append(f"{report.counts['rejected']:,} of {report.counts['input']:,} rows set aside{where}")
    if report.warnings:
        said.append(f"worth a look: {', '.join(ISSUE_TYPES[finding.code].name for finding in report.warnings)}")
    if said:
        tell(f"{report.source}: {'; '.join(said)}. print(check_examples(...)) says more.")
    return report.examples


class Row(NamedTuple):
    """A record that can be used, as examples."""

    record: Record
    form: str
    examples: list[Example]
    place: Place


def to_row(record: Record) -> Row | Issue:
    """The record as examples, or why it cannot be used."""
    outcome = record.issue or to_examples(record.value)
    if isinstance(outcome, Issue):
        return outcome
    own = next((str(value)[:99] for name, value in record.value.items() if str(name).strip().lower() == "split"), "")
    part = next(filter(None, map(part_of, (own, record.part))), "train")
    return Row(record, *outcome, Place(record.file, record.line, part))


class _Check:
    """The state of one check: what was kept and found so far."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, max_length: int | None, truncate: bool) -> None:
        self.tokenizer, self.max_length, self.truncate = tokenizer, max_length, truncate
        self.form = ""  # of the data set: that of most of its first batch
        self.read, self.files = 0, dict[str, None]()
        self.parts: list[Dataset] = []
        self.kept: list[Place] = []
        self.first_with: dict[bytes, Place] = {}  # the first row that says this
        self.texts, self.questions, self.answers = MinHashIndex(), array("q"), array("q")  # of kept rows, as numbers
        self.rejected: list[dict[str, Any]] = []
        self.room = MOST_REJECTED
        self.findings: dict[str, Finding] = {}
        self.unused: Counter[str] = Counter()
        self.notes: list[str] = []
        self.tokens = TokenCheck(tokenizer, max_length) if tokenizer else None
        self.control = control_tokens(tokenizer) if tokenizer else None
        if tokenizer and ensure_chat_template(tokenizer):
            self.notes.append("the tokenizer had no chat template: it was given a plain one (### Question, ### Answer)")

    def add(self, batch: list[Record]) -> None:
        """One batch of records, through one check after the other; what comes out at the end is kept."""
        self.read += len(batch)
        self.files |= dict.fromkeys(record.file for record in batch)
        outcomes = [to_row(record) for record in batch]
        forms = Counter(row.form for row in outcomes if isinstance(row, Row))
        self.form = self.form or (forms.most_common(1)[0][0] if forms else "")
        columns: dict[str, list[Any]] = {name: [] for name in FEATURES.get(self.form, ())}
        for record, row in zip(batch, outcomes):
            issue = row if isinstance(row, Issue) else self._other_form(row) or self._duplicate(row) or self._unfit(row)
            if issue:
                self._set_aside(record, issue)
            elif isinstance(row, Row):
                self._keep(row, columns)
        if any(columns.values()):
            features = FEATURES[self.form]
            typed = {name: pa.array(columns[name], features.arrow_schema.field(name).type) for name in columns}
            self.parts.append(Dataset.from_dict(typed, features=features))

    def _keep(self, row: Row, columns: dict[str, list[Any]]) -> None:
        """Write a row's examples into the columns, and remember what it says and what is suspicious in it."""
        for example in row.examples:
            for name in columns:
                columns[name].append(len(self.kept) if name == "group" else example[name])
        self.kept.append(row.place)
        said = texts_of(row.examples[-1])
        keys = self.texts.add(*said)
        ends = [len(texts_of(example)) - 1 for example in row.examples]
        self.questions.append(keys[max(0, ends[0] - 1)])
        self.answers.extend(keys[end] for end in ends)
        if len(self.unused) < BATCH:
            self.unused.update({str(name) for name in row.record.value} - used_columns(row.record.value))
        seen: dict[str, str] = {}
        for text in said:
            seen |= suspicions(text)
        for code, what in seen.items():
            self._found(code, row.place, what)

    def _other_form(self, row: Row) -> Issue | None:
        if row.form == self.form:
            return None
        this, most = ("plain text", "chats") if row.form == TEXT else ("a question with an answer", "plain text")
        return Issue("other form", f"this is {this}, most rows are {most}")

    def _duplicate(self, row: Row) -> Issue | None:
        said = repr(row.examples).encode("utf-8", "replace")
        first = self.first_with.setdefault(hashlib.blake2b(said, digest_size=12).digest(), row.place)
        if first is row.place:
            return None
        if (first.part == "train") != (row.place.part == "train"):
            self._found("leak", row.place)
        where = f"line {first.line}" if first.file == row.place.file else f"{first.file}, line {first.line}"
        return Issue("duplicate", f"the same as {where}")

    def _unfit(self, row: Row) -> Issue | None:
        """Is every text only text to the model, and does its length hold the answers, or with `truncate` a part?"""
        if not self.tokens or not self.control:
            return None
        said = [] if row.form == TEXT else texts_of(row.examples[-1])
        if found := next(filter(None, map(self.control.search, said)), None):
            return Issue("control token", f"it holds {found[0]!r}, which is no text to this model")
        try:
            tokens = tokenize(row.examples, self.tokenizer)
        except DataError as error:
            return Issue("template", str(error))
        self.tokens.lengths += [len(one.ids) for one in tokens]
        longest = max(len(one.ids) for one in tokens)
        if any(all(label == MASKED for label in one.labels[: self.max_length]) for one in tokens):
            return Issue("nothing left", f"no token of an answer would be trained ({longest:,} tokens)")
        if self.max_length and longest > self.max_length:
            cut = f"{longest:,} tokens, {longest - self.max_length:,} more than max_length {self.max_length}"
            if not self.truncate:
                return Issue("too long", cut)
            self._found("cut", row.place, cut)
        for example, one in zip(row.examples, tokens):
            self.tokens.add(example, one, f"line {row.place.line}")
        return None

    def _set_aside(self, record: Record, issue: Issue) -> None:
        kind, place = ISSUE_TYPES[issue.code], Place(record.file, record.line)
        self._found(issue.code, place, issue.reason)
        row = {"file": place.file, "line": place.line, "fault": kind.name, "reason": issue.reason, "fix": kind.fix}
        row["record"] = None if issue.code == "too large" else record.value
        self.room -= len(as_json(row)) if self.room > 0 else 0
        if self.room > 0:
            self.rejected.append(row)

    def _found(self, code: str, place: Place, detail: str = "") -> None:
        self.findings.setdefault(code, Finding(code)).add(place, detail)

    def report(self, source: str) -> Report:
        """Everything that was found, once all records went through."""
        features = FEATURES[self.form or CHAT]
        empty = Dataset.from_dict({name: [] for name in features}, features=features)
        examples = concatenate_datasets(self.parts or [empty])
        self.first_with.clear()  # makes room for what follows
        parts = [place.part for place in self.kept]
        if len(set(parts)) > 1 and "train" in parts:
            examples = examples.add_column("part", [parts[row] for row in examples["group"]])
            for place in self.kept:
                if place.part != "train":
                    self._found("held out", place, f"it is for {place.part}")
        self._across_rows()
        if len(examples):
            self._repeated_answers(examples)
            self._note(len(examples))
        rejected = sum(found.count for code, found in self.findings.items() if ISSUE_TYPES[code].rejects)
        if len(self.rejected) < rejected:
            self.notes.append(f"only the first {len(self.rejected):,} of the rows set aside are kept, to be written")
        counts = {"input": self.read, "kept": len(self.kept), "rejected": rejected, "examples": len(examples)}
        found = self.findings, self.notes, self.tokens, self._stop(), list(self.files)
        return Report(source, examples, self.rejected, counts, *found)

    def _across_rows(self) -> None:
        """What only the whole data set shows: near duplicates, and leaks between its parts."""
        groups, places, only_file = self.texts.groups(), self.kept, len({place.file for place in self.kept}) == 1
        for rows in groups.lists():
            if len(rows) > 1:
                names = ("line " * only_file + places[row].show(only_file) for row in rows[:4])
                self._found("near duplicate", places[rows[1]], f"{' and '.join(names)} belong together")
        groups.join_equal(self.questions)
        for rows in groups.lists() if "held out" in self.findings else []:
            trained = [places[row] for row in rows if places[row].part == "train"]
            for place in (places[row] for row in rows if trained and places[row].part != "train"):
                first = "line " * only_file + trained[0].show(only_file)
                self._found("leak", place, f"it stands in training at {first}")

    def _repeated_answers(self, examples: Dataset) -> None:
        """All answers that occur too often, as one finding about the most frequent."""
        answers = np.array(self.answers)
        known, first, counts = np.unique(answers, return_index=True, return_counts=True)
        often = np.flatnonzero(counts >= max(REPEATED, REPEATED_SHARE * len(self.kept)))
        if self.form == TEXT or not len(often):
            return
        top = min(often, key=lambda one: (-counts[one], first[one]))
        rows = examples.select(np.flatnonzero(answers == known[top]))
        others = f"; {len(often) - 1} more such answers" if len(often) > 1 else ""
        detail = f"{rows[0]['completion'][0]['content'][:60]!r} answers {len(rows):,} rows{others}"
        places = [self.kept[row] for row in rows[:PLACES]["group"]]
        found = Finding("repeated answer", int(counts[often].sum()), places, detail, of_one_row=False)
        self.findings[found.code] = found

    def _note(self, examples: int) -> None:
        if self.form == TEXT:
            self.notes.append("plain text: the loss counts every token, not only answers")
        if unused := [f"{name!r:.60}" for name, _ in self.unused.most_common(8) if name]:
            self.notes.append(f"columns that are not trained on: {', '.join(unused)}")
        not_checked = "tokens were not checked: name the model (tokenizer=..., or --model on the command line)"
        self.notes += str(self.tokens).splitlines() if self.tokens else [not_checked]
        enough = next(words for fewest, words in ENOUGH_FOR.items() if examples >= fewest)
        self.notes.append(f"{examples:,} examples are enough {enough}")

    def _stop(self) -> str:
        """Why training could not start; empty if it could."""
        if not self.read:
            return "there is no row in it. Choose the file that holds your examples."
        if not self.kept:
            worst = max(self.findings.values(), key=lambda finding: finding.count)
            return f"no row can be used. {worst.detail} (line {worst.places[0].line}). {ISSUE_TYPES[worst.code].fix}"
        if len(self.kept) < 2:
            return "one row is too few to train on and to hold one out. Add examples."
        return self.tokens.stop() if self.tokens else ""

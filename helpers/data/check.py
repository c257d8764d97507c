"""Check a data set before any minute of training is spent on it: what can be used, what cannot and why, what to look at.

    report = check_examples("my_examples.jsonl", tokenizer, max_length=512)
    print(report)
    report.examples, report.rejected, report.ready
    examples = load_examples("my_examples.jsonl")       # the same check, in a line, for those who only want the examples

Nothing is dropped silently: every record that was read is either kept or in `report.rejected`, with the reason and the fix. Records go
through in batches, so that besides the examples themselves only a few numbers per record are held in memory.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from datasets import Dataset, Features, Value, concatenate_datasets

from helpers.data.convert import TEXT, Example, texts_of, to_examples, used_columns
from helpers.data.issues import ISSUE_TYPES, DataError, Finding, Issue, Place, Report, is_broken, suspicions
from helpers.data.parse import Record
from helpers.data.read import is_held_out, name_of, read
from helpers.data.splitting import MinHashIndex, plain
from helpers.data.tokens import MASKED, TokenCheck, ensure_chat_template, tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH = 1000  # records looked at together; the form of most of the first batch is the form of the data set
REPEATED, REPEATED_SHARE = 5, 0.01  # an answer counts as repeated from 5 times and 1 % of the rows on
SMALL, ENOUGH = 50, 500  # examples: below 50, even a style is hard to learn; 500 are worth a first training
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
        source: whatever `helpers.data.read.read` takes: file, folder, Hub id, DataFrame, list of dicts.
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
        check.add(batch)
    return check.report(name_of(source))


def load_examples(
    source: Any,
    rejected: str | Path | None = "rejected.jsonl",
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_length: int | None = None,
    truncate: bool = False,
) -> Dataset:
    """The examples of a source, ready for `split`. Prints nothing if all is well, and one line if not.

    Args:
        source, tokenizer, max_length, truncate: as in `check_examples`.
        rejected: where rows that cannot be used are written, with reason and fix; None writes nothing.

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
        said.append(f"worth a look: {', '.join(ISSUE_TYPES[finding.code].name for finding in report.warnings)}")
    if said:
        print(f"{report.source}: {'; '.join(said)}. print(check_examples(...)) says more.")
    return report.examples


class Row(NamedTuple):
    """A record that can be used, as examples."""

    record: Record
    form: str
    examples: list[Example]

    @property
    def place(self) -> Place:
        """Where it stands."""
        return Place(self.record.file, self.record.line)

    @property
    def digest(self) -> bytes:
        """12 bytes that stand for everything the row says: equal for exact duplicates only."""
        return hashlib.blake2b(repr(self.examples).encode("utf-8", "replace"), digest_size=12).digest()

    @property
    def held_out(self) -> bool:
        """Does the row itself (column `split`) or the name of its file say that it is for validation or testing?"""
        own = self.record.value.get("split")
        return is_held_out(own if isinstance(own, str) else self.record.file)


def to_row(record: Record) -> Row | Issue:
    """The record as examples, or why it cannot be used."""
    outcome = record.issue or to_examples(record.value)
    if isinstance(outcome, Issue):
        return outcome
    form, examples = outcome
    if any(is_broken(text) for text in texts_of(examples[-1])):
        return Issue("broken characters", "it holds half characters, as a wrong encoding leaves them")
    for turns in (texts_of(example)[-2:] for example in examples if form != TEXT):
        if turns[0].strip().casefold() == turns[1].strip().casefold():
            return Issue("echo", "the answer only repeats the question")
    return Row(record, form, examples)


class _Overview:
    """What only the whole data set shows: near duplicates, leaks between its parts, one answer everywhere."""

    def __init__(self) -> None:
        self.texts = MinHashIndex()
        self.places: list[Place] = []
        self.held_out: list[bool] = []
        self.questions: list[int] = []
        self.answers: dict[int, Finding] = {}

    def add(self, row: Row, held_out: bool) -> None:
        """One row, of which a signature and a few numbers are kept."""
        self.texts.add("\n".join(texts_of(row.examples[-1])))
        self.places.append(row.place)
        self.held_out.append(held_out)
        first = row.examples[0]
        self.questions.append(hash(plain(first["prompt"][-1]["content"] if "prompt" in first else first["text"])))

    def add_answers(self, row: Row) -> None:
        """The answers of one row that will be trained."""
        for answer in (example["completion"][0]["content"] for example in row.examples if "completion" in example):
            known = self.answers.setdefault(hash(plain(answer)), Finding("repeated answer"))
            known.add(row.place, "" if known.count else f"{answer[:60]!r}")

    def findings(self) -> list[Finding]:
        """Groups of rows that say nearly the same; a group in both parts is a leak, and so is a question in both."""
        near, leaks, often = Finding("near duplicate"), Finding("leak"), Finding("repeated answer", of_one_row=False)
        groups = self.texts.groups()
        for group in groups.lists():
            if len(group) > 1:
                near.add(self.places[group[1]], f"{self._names(group[:4])} belong together")
        if any(self.held_out):
            groups.join_equal(self.questions)
            for group in groups.lists():
                trained = [index for index in group if not self.held_out[index]]
                for index in group if trained else []:
                    if self.held_out[index]:
                        leaks.add(self.places[index], f"it stands in training at {self._names(trained[:1])}")
        fewest = max(REPEATED, REPEATED_SHARE * len(self.places))
        if many := sorted((a for a in self.answers.values() if a.count >= fewest), key=lambda answer: -answer.count):
            often.count, often.places = sum(answer.count for answer in many), many[0].places
            others = f"; {len(many) - 1} more such answers" if len(many) > 1 else ""
            often.detail = f"{many[0].detail} answers {many[0].count:,} rows{others}"
        return [finding for finding in (near, leaks, often) if finding.count]

    def _names(self, group: list[int]) -> str:
        """Some places in words, with their files where these differ."""
        only_file = len({place.file for place in self.places}) == 1
        return " and ".join("line " * only_file + self.places[index].show(only_file) for index in group)


class _Check:
    """The state of one check: what was kept and found so far."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, max_length: int | None, truncate: bool) -> None:
        self.tokenizer, self.max_length, self.truncate = tokenizer, max_length, truncate
        self.form = ""
        self.read = self.kept = 0
        self.parts: list[Dataset] = []
        self.rejected: list[dict[str, Any]] = []
        self.findings: dict[str, Finding] = {}
        self.first_with: dict[bytes, tuple[Place, bool]] = {}  # digest of a row -> its first place, and is it held out
        self.overview = _Overview()
        self.unused: Counter[str] = Counter()
        self.notes: list[str] = []
        self.tokens = TokenCheck(tokenizer, max_length) if tokenizer else None
        if tokenizer and ensure_chat_template(tokenizer):
            self.notes.append("the tokenizer had no chat template: it was given a plain one (### Question, ### Answer)")

    def note_held_out(self, records: Iterator[Record]) -> None:
        """Remember a validation source, without keeping or judging it."""
        for row in map(to_row, records):
            if isinstance(row, Row):
                self.first_with.setdefault(row.digest, (row.place, True))
                self.overview.add(row, held_out=True)

    def add(self, batch: list[Record]) -> None:
        """One batch of records, through one check after the other; what comes out at the end is kept."""
        self.read += len(batch)
        rows = []
        for record in batch:
            row = to_row(record)
            if isinstance(row, Row):
                rows.append(row)
            else:
                self._set_aside(record, row)
        if rows and not self.form:
            self.form = Counter(row.form for row in rows).most_common(1)[0][0]
        rows = [row for row in rows if self._has_form(row) and self._is_new(row) and self._fits(row)]
        if not rows:
            return
        columns: dict[str, list[Any]] = {name: [] for name in FEATURES[self.form]}
        for row in rows:
            for example in row.examples:
                for name in columns:
                    columns[name].append(self.kept if name == "group" else example[name])
            self.overview.add(row, row.held_out)
            self.overview.add_answers(row)
            for code, seen in {
                code: seen for text in texts_of(row.examples[-1]) for code, seen in suspicions(text).items()
            }.items():
                self._found(code, row.place, seen)
            self.unused.update({str(name) for name in row.record.value} - used_columns(row.record.value))
            self.kept += 1
        self.parts.append(Dataset.from_dict(columns, features=FEATURES[self.form]))

    def _has_form(self, row: Row) -> bool:
        if row.form != self.form:
            this, most = ("plain text", "chats") if row.form == TEXT else ("a question with an answer", "plain text")
            self._set_aside(row.record, Issue("other form", f"this is {this}, most rows are {most}"))
        return row.form == self.form

    def _is_new(self, row: Row) -> bool:
        here = row.place, row.held_out
        first = self.first_with.setdefault(row.digest, here)
        if first is here:
            return True
        place, held_out = first
        if held_out != row.held_out:
            self._found("leak", row.place)
        where = f"line {place.line}" if place.file == row.place.file else f"{place.file}, line {place.line}"
        self._set_aside(row.record, Issue("duplicate", f"the same as {where}"))
        return False

    def _fits(self, row: Row) -> bool:
        """Does the sequence length hold the row's answers whole (or, with `truncate`, at least in part)?"""
        if not self.tokens:
            return True
        try:
            tokens = tokenize(row.examples, self.tokenizer)
        except DataError as error:
            self._set_aside(row.record, Issue("template", str(error)))
            return False
        self.tokens.lengths += [len(one.ids) for one in tokens]
        longest = max(len(one.ids) for one in tokens)
        too_long = self.max_length is not None and longest > self.max_length
        cut = f"{longest:,} tokens, {longest - (self.max_length or 0):,} more than max_length {self.max_length}"
        issue = None
        if any(all(label == MASKED for label in one.labels[: self.max_length]) for one in tokens):
            issue = Issue("nothing left", f"no token of an answer would be trained ({longest:,} tokens)")
        elif too_long and not self.truncate:
            issue = Issue("too long", cut)
        if issue:
            self._set_aside(row.record, issue)
            return False
        if too_long:
            self._found("cut", row.place, cut)
        for example, one in zip(row.examples, tokens):
            self.tokens.add(example, one, f"line {row.place.line}")
        return True

    def _set_aside(self, record: Record, issue: Issue) -> None:
        kind = ISSUE_TYPES[issue.code]
        self._found(issue.code, Place(record.file, record.line), issue.reason)
        place = {"file": record.file, "line": record.line}
        self.rejected.append(
            place | {"fault": kind.name, "reason": issue.reason, "fix": kind.fix, "record": record.value}
        )

    def _found(self, code: str, place: Place, detail: str = "") -> None:
        self.findings.setdefault(code, Finding(code)).add(place, detail)

    def report(self, source: str) -> Report:
        """Everything that was found, once all records went through."""
        features = FEATURES[self.form or "chat"]
        empty = Dataset.from_dict({name: [] for name in features}, features=features)
        examples = concatenate_datasets(self.parts) if self.parts else empty
        for finding in self.overview.findings():
            known = self.findings.setdefault(finding.code, finding)
            if known is not finding:
                for place in finding.places:
                    known.add(place)
                known.count += finding.count - len(finding.places)
        counts = {"input": self.read, "kept": self.kept, "rejected": len(self.rejected), "examples": len(examples)}
        return Report(
            source,
            examples,
            self.rejected,
            counts,
            self.findings,
            self._notes(len(examples)),
            self.tokens,
            self._stop(),
        )

    def _notes(self, examples: int) -> list[str]:
        notes = list(self.notes)
        if self.form == TEXT:
            notes.append("plain text: the loss counts every token, not only answers")
        if unused := [repr(name) for name, _ in self.unused.most_common(8) if name]:
            notes.append(f"columns that are not trained on: {', '.join(unused)}")
        if self.tokens:
            notes += str(self.tokens).splitlines()
        else:
            notes.append("tokens were not checked: name the model (tokenizer=..., or --model on the command line)")
        if examples < SMALL:
            goes_far = (
                "enough to try the code, hardly to learn from: 50 to 100 teach a style, 500 are a first real run."
            )
        elif examples < ENOUGH:
            goes_far = "enough for a style or a format; 500 are for a first real run, and good ones beat many."
        else:
            goes_far = "enough to start (500 are); hold 10 to 20 % of them out with split()."
        return [*notes, f"{examples:,} examples are {goes_far}"] if examples else notes

    def _stop(self) -> str:
        """Why training could not start; empty if it could."""
        if not self.read:
            return "there is no row in it. Choose the file that holds your examples."
        if not self.kept:
            worst = max(self.findings.values(), key=lambda finding: finding.count)
            return f"no row can be used. {worst.detail} (line {worst.places[0].line}). {ISSUE_TYPES[worst.code].fix}"
        if self.kept < 2:
            return "one row is too few to train on and to hold one out. Add examples."
        return self.tokens.stop() if self.tokens else ""

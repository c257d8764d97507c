"""Check a data set before any minute of training is spent on it: what can be used, what cannot and why.

    report = check_examples("my_examples.jsonl", tokenizer, max_length=512)
    print(report)
    report.examples, report.rejected, report.ready
    examples = load_examples("my_examples.jsonl")       # the same check, said in one line

Nothing is dropped silently: every record that was read is either kept or in `report.rejected`, with the reason and the
fix. Records go through in batches, so that besides the examples only a few numbers per record are held in memory.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from datasets import Dataset, Features, Value, concatenate_datasets

from helpers.config import noted
from helpers.data.convert import TEXT, Example, texts_of, to_examples, used_columns
from helpers.data.issues import ISSUE_TYPES, PLACES, DataError, Finding, Issue, Place, Report, is_broken, suspicions
from helpers.data.parse import Record
from helpers.data.read import is_held_out, name_of, read
from helpers.data.splitting import MinHashIndex, plain
from helpers.data.tokens import MASKED, TokenCheck, ensure_chat_template, tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH = 1000  # records looked at together; the form of most of the first batch is the form of the data set
REPEATED, REPEATED_SHARE = 5, 0.01  # an answer counts as repeated from 5 times and 1 % of the rows on
ENOUGH_FOR = {  # so many examples
    500: "to start (500 are); hold 10 to 20 % of them out with split().",
    50: "for a style or a format; 500 are for a first real run, and good ones beat many.",
    1: "to try the code, hardly to learn from: 50 to 100 teach a style, 500 are a first real run.",
}
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
) -> Report:
    """Read a source, set aside what cannot be used, and say what else is worth a look.

    Args:
        source: whatever `helpers.data.read.read` takes: file, folder, Hub id, DataFrame, list of dicts.
        tokenizer: the model's; without it, everything that depends on tokens is skipped, and the report says so.
        max_length: tokens of the longest example that will be trained. Answers that would be cut are set aside ...
        truncate: ... unless this is True: then they are kept, and trained without their end.

    Raises:
        DataError: the source as a whole cannot be read.
    """
    check = _Check(tokenizer, max_length, truncate)
    records = read(source)
    while batch := list(islice(records, BATCH)):
        check.add(batch)
    report = check.report(name_of(source))
    noted(report.examples, **({"data": str(Path(source).resolve())} if isinstance(source, str | Path) else {}))
    return report


def load_examples(source: Any, rejected: str | Path | None = "rejected.jsonl") -> Dataset:
    """The examples of a source, ready for `split`. Prints nothing if all is well, and one line if not.

    Args:
        source: as in `check_examples`.
        rejected: where rows that cannot be used are written, with reason and fix; None writes nothing.

    Raises:
        DataError: there is no such source, or nothing in it can be used.
    """
    report = check_examples(source)
    if not report.counts["kept"]:
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


class _Check:
    """The state of one check: what was kept and found so far."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, max_length: int | None, truncate: bool) -> None:
        self.tokenizer, self.max_length, self.truncate = tokenizer, max_length, truncate
        self.form = ""
        self.read = 0
        self.parts: list[Dataset] = []
        self.kept: list[tuple[Place, bool]] = []  # where each row that was kept stands, and is it held out
        self.first_with: dict[bytes, tuple[Place, bool]] = {}  # the same of the first row that says this
        self.rejected: list[dict[str, Any]] = []
        self.findings: dict[str, Finding] = {}
        self.unused: Counter[str] = Counter()
        self.notes: list[str] = []
        self.tokens = TokenCheck(tokenizer, max_length) if tokenizer else None
        if tokenizer and ensure_chat_template(tokenizer):
            self.notes.append("the tokenizer had no chat template: it was given a plain one (### Question, ### Answer)")

    def add(self, batch: list[Record]) -> None:
        """One batch of records, through one check after the other; what comes out at the end is kept."""
        self.read += len(batch)
        outcomes = [to_row(record) for record in batch]
        forms = Counter(row.form for row in outcomes if isinstance(row, Row))
        self.form = self.form or (forms.most_common(1)[0][0] if forms else "")
        columns: dict[str, list[Any]] = {name: [] for name in FEATURES.get(self.form, ())}
        for record, row in zip(batch, outcomes):
            if isinstance(row, Issue):
                self._set_aside(record, row)
                continue
            if issue := self._other_form(row) or self._duplicate(row) or self._unfit(row):
                self._set_aside(record, issue)
                continue
            for example in row.examples:
                for name in columns:
                    columns[name].append(len(self.kept) if name == "group" else example[name])
            self.kept.append((row.place, row.held_out))
            self.unused.update({str(name) for name in record.value} - used_columns(record.value))
            seen: dict[str, str] = {}
            for text in texts_of(row.examples[-1]):
                seen |= suspicions(text)
            for code, what in seen.items():
                self._found(code, row.place, what)
        if any(columns.values()):
            self.parts.append(Dataset.from_dict(columns, features=FEATURES[self.form]))

    def _other_form(self, row: Row) -> Issue | None:
        if row.form == self.form:
            return None
        this, most = ("plain text", "chats") if row.form == TEXT else ("a question with an answer", "plain text")
        return Issue("other form", f"this is {this}, most rows are {most}")

    def _duplicate(self, row: Row) -> Issue | None:
        here = row.place, row.held_out
        first = self.first_with.setdefault(row.digest, here)
        if first is here:
            return None
        place, held_out = first
        if held_out != row.held_out:
            self._found("leak", row.place)
        where = f"line {place.line}" if place.file == row.place.file else f"{place.file}, line {place.line}"
        return Issue("duplicate", f"the same as {where}")

    def _unfit(self, row: Row) -> Issue | None:
        """Does the sequence length hold the row's answers whole (or, with `truncate`, at least in part)?"""
        if not self.tokens:
            return None
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
        why = {"fault": kind.name, "reason": issue.reason, "fix": kind.fix}
        self.rejected.append(place._asdict() | why | {"record": record.value})

    def _found(self, code: str, place: Place, detail: str = "") -> None:
        self.findings.setdefault(code, Finding(code)).add(place, detail)

    def report(self, source: str) -> Report:
        """Everything that was found, once all records went through."""
        features = FEATURES[self.form or "chat"]
        empty = Dataset.from_dict({name: [] for name in features}, features=features)
        examples = concatenate_datasets(self.parts or [empty])
        for finding in across_rows(examples, *zip(*self.kept)) if self.kept else []:
            known = self.findings.setdefault(finding.code, finding)
            if known is not finding:  # exact duplicates were leaks already
                known.count, known.places = known.count + finding.count, (known.places + finding.places)[:PLACES]
        if len(examples):
            self._note(len(examples))
        counts = {"input": self.read, "kept": len(self.kept), "rejected": len(self.rejected), "examples": len(examples)}
        found = self.findings, self.notes, self.tokens, self._stop()
        return Report(source, examples, self.rejected, counts, *found)

    def _note(self, examples: int) -> None:
        if self.form == TEXT:
            self.notes.append("plain text: the loss counts every token, not only answers")
        if unused := [repr(name) for name, _ in self.unused.most_common(8) if name]:
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


def across_rows(examples: Dataset, places: Sequence[Place], held_out: Sequence[bool]) -> list[Finding]:
    """What only the whole data set shows: near duplicates, leaks between its parts, one answer to many questions.

    Args:
        places, held_out: of each row; `examples["group"]` is the number of the row.
    """
    texts, questions = MinHashIndex(), []
    answers: dict[int, Finding] = {}
    for row, group in groupby(examples, key=lambda example: example["group"]):
        said = [texts_of(example) for example in group]
        texts.add("\n".join(said[-1]))
        questions.append(hash(plain(said[0][-2:][0])))
        for *question, answer in said:
            if question:  # plain text has none
                known = answers.setdefault(hash(plain(answer)), Finding("repeated answer"))
                known.add(places[row], "" if known.count else f"{answer[:60]!r}")
    only_file = len({place.file for place in places}) == 1
    names = ["line " * only_file + place.show(only_file) for place in places]
    near, leaks = Finding("near duplicate"), Finding("leak")
    groups = texts.groups()
    for rows in groups.lists():
        if len(rows) > 1:
            near.add(places[rows[1]], f"{' and '.join(names[row] for row in rows[:4])} belong together")
    groups.join_equal(questions)
    for rows in groups.lists():
        trained = [row for row in rows if not held_out[row]]
        for row in (row for row in rows if trained and held_out[row]):
            leaks.add(places[row], f"it stands in training at {names[trained[0]]}")
    fewest = max(REPEATED, REPEATED_SHARE * len(places))
    return [found for found in (near, leaks, *_repeated(list(answers.values()), fewest)) if found.count]


def _repeated(answers: list[Finding], fewest: float) -> list[Finding]:
    """All answers that occur so often, as one finding about the most frequent."""
    often = sorted((found for found in answers if found.count >= fewest), key=lambda found: -found.count)
    for first in often[:1]:
        others = f"; {len(often) - 1} more such answers" if len(often) > 1 else ""
        first.detail += f" answers {first.count:,} rows{others}"
        first.count, first.of_one_row = sum(found.count for found in often), False
    return often[:1]

"""One record on its way through the check: what it says, where it stands, and what is wrong with it alone.

row = to_row(record)            # a Row, or the Problem that keeps it from being used

What only the whole data set shows: near duplicates, leaks between its parts, one answer everywhere, a mix of languages.

overview = Overview()
overview.add(examples_of_one_row, place, held_out=False)
for finding in overview.findings(): ...

Check a data set before any minute of training is spent on it: what can be used, what cannot and why, what to look at.

    report = check_examples("my_examples.jsonl", tokenizer, max_length=512)
    print(report)
    report.examples, report.rejected, report.ready

Nothing is dropped silently: every record that was read is either kept or in `report.rejected`, with the reason and the fix. Records go
through in batches, so that besides the examples themselves only a few numbers per record are held in memory.

Any source in, examples out; what cannot be used is set aside and named.
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
from helpers.data.issues import FAULTS, DataError, Problem, is_broken, language, suspicions
from helpers.data.read import Record, is_held_out, name_of, read
from helpers.data.report import PLACES, Finding, Place, Report, advice
from helpers.data.splitting import MinHashIndex, plain
from helpers.data.tokens import MASKED, TokenCheck, ensure_chat_template, tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Row(NamedTuple):
    """A record that can be used, as examples."""

    record: Record
    form: str
    examples: list[Example]

    @property
    def place(self) -> Place:
        return Place((self.record.file, self.record.line))

    @property
    def digest(self) -> bytes:
        """12 bytes that stand for everything the row says: equal for exact duplicates only."""
        return hashlib.blake2b(repr(self.examples).encode("utf-8", "replace"), digest_size=12).digest()

    @property
    def held_out(self) -> bool:
        """Does the row itself (column `split`) or the name of its file say that it is for validation or testing?"""
        own = self.record.value.get("split")
        return is_held_out(own) if isinstance(own, str) else is_held_out(self.record.file)


def to_row(record: Record) -> Row | Problem:
    """The record as examples, or why it cannot be used."""
    outcome = record.problem or to_examples(record.value)
    if isinstance(outcome, Problem):
        return outcome
    form, examples = outcome
    if any(is_broken(text) for text in texts_of(examples[-1])):
        return Problem("broken characters", "it holds half characters, as a wrong encoding leaves them")
    if form != TEXT and any(_echoes(example) for example in examples):
        return Problem("echo", "the answer only repeats the question")
    return Row(record, form, examples)


def _echoes(example: Example) -> bool:
    return example["prompt"][-1]["content"].strip().casefold() == example["completion"][0]["content"].strip().casefold()


REPEATED, REPEATED_SHARE = 5, 0.01  # an answer counts as repeated from 5 times and 1 % of the rows on
LARGEST_LANGUAGE = 10  # rows whose language is clear, needed to call another one odd


class Overview:
    """Fed row by row; keeps a signature and a few numbers of each."""

    def __init__(self) -> None:
        self.signatures = MinHashIndex()
        self.places: list[Place] = []
        self.held_out: list[bool] = []
        self.questions: list[int] = []
        self.answers: dict[int, Finding] = {}
        self.languages: dict[str, Finding] = {}

    def add(self, examples: list[Example], place: Place, held_out: bool, counts: bool = True) -> None:
        """One row. `counts`: it belongs to the data itself, not to a validation source that is only compared with."""
        said = texts_of(examples[-1])
        self.signatures.add("\n".join(said))
        self.places.append(place)
        self.held_out.append(held_out)
        first = examples[0]
        self.questions.append(hash(plain(first["prompt"][-1]["content"] if "prompt" in first else first["text"])))
        if not counts:
            return
        if "completion" in first:
            for example in examples:
                answer = example["completion"][0]["content"]
                known = self.answers.setdefault(hash(plain(answer)), Finding("repeated answer"))
                known.add(place, f"{answer[:60]!r}" if not known.count else "")
        spoken = language(said[-1])
        if spoken:
            self.languages.setdefault(spoken, Finding("language")).add(place)

    def findings(self) -> list[Finding]:
        """One finding of each kind that occurs."""
        found = [self._near_duplicates_and_leaks(), self._repeated_answers(), self._languages()]
        return [finding for findings in found for finding in findings if finding.count]

    def _near_duplicates_and_leaks(self) -> list[Finding]:
        """Groups of rows that say nearly the same; a group in both parts is a leak, and so is a question in both."""
        near, leaks = Finding("near duplicate"), Finding("leak")
        groups = self.signatures.groups()
        for group in groups.lists():
            if len(group) > 1:
                near.add(self.places[group[1]], f"{_and(self.places, group[:4])} belong together")
        if any(self.held_out):
            first_with: dict[int, int] = {}
            for index, question in enumerate(self.questions):
                groups.join(index, first_with.setdefault(question, index))
            for group in groups.lists():
                trained = [index for index in group if not self.held_out[index]]
                for index in group if trained else []:
                    if self.held_out[index]:
                        leaks.add(self.places[index], f"it stands in training at {_and(self.places, trained[:1])}")
        return [near, leaks]

    def _repeated_answers(self) -> list[Finding]:
        often = [
            finding
            for finding in self.answers.values()
            if finding.count >= max(REPEATED, REPEATED_SHARE * len(self.places))
        ]
        often.sort(key=lambda finding: -finding.count)
        if not often:
            return []
        first = often[0]
        others = f"; {len(often) - 1} more such answers" if len(often) > 1 else ""
        total = sum(finding.count for finding in often)
        return [
            Finding(
                "repeated answer", total, first.places, f"{first.detail} answers {first.count:,} rows{others}", False
            )
        ]

    def _languages(self) -> list[Finding]:
        """Rows in another language than the most common one."""
        ranked = sorted(self.languages.items(), key=lambda entry: -entry[1].count)
        if len(ranked) < 2 or ranked[0][1].count < LARGEST_LANGUAGE:
            return []
        main, others = ranked[0], ranked[1:]
        places = [place for _, finding in others for place in finding.places][:5]
        named = ", ".join(f"{finding.count:,} {name}" for name, finding in others[:4])
        return [
            Finding(
                "language",
                sum(finding.count for _, finding in others),
                places,
                f"{main[1].count:,} {main[0]}, {named}",
                False,
            )
        ]


def _and(places: list[Place], group: list[int]) -> str:
    """Some places in words, with their files where these differ."""
    only_file = len({place[0] for place in places}) == 1
    return " and ".join(("line " if only_file else "") + places[index].show(only_file) for index in group)


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
        source: whatever `helpers.data.read.read` takes: file, folder, Hub id, DataFrame, upload, list of dicts.
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


def load_examples(
    source: Any,
    rejected: str | Path | None = "rejected.jsonl",
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_length: int | None = None,
    truncate: bool = False,
) -> Dataset:
    """The examples of a source, ready for `split`. Prints nothing if all is well, and one line if not.

    Args:
        source: file, folder, Hub id, DataFrame, `upload()`; see `helpers.data.read.read`.
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

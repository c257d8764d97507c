"""Everything that can be wrong with a row, in one table; what one text gives away; and the report of what was found.

    suspicions("Write to jo@example.org")       # {"private": "an e-mail address (jo@...)"}
    print(check_examples("my_examples.csv"))    # a `Report`: counts first, then each finding with places and fix

The patterns point at lines to look at, and are wrong now and then.
"""

from __future__ import annotations

import json
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from helpers.files import atomic_file
from helpers.page import filled

if TYPE_CHECKING:
    from datasets import Dataset

    from helpers.data.tokens import TokenCheck


class DataError(ValueError):
    """The data cannot be used. The message names the file, the place and the fix."""


def first_line(error: BaseException) -> str:
    """The first line of what an exception says, for a message of one sentence."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def tell(text: object) -> None:
    """Print, with characters that the console cannot show escaped."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    print(str(text).encode(encoding, "backslashreplace").decode(encoding))


class IssueType(NamedTuple):
    """One kind of mistake. A row that has it is set aside (`rejects`), or kept and pointed at."""

    name: str
    fix: str
    rejects: bool


class Issue(NamedTuple):
    """One mistake in one row: the code of its `IssueType`, and what is wrong here."""

    code: str
    reason: str


SET_ASIDE = {
    "broken line": ("broken lines", "Mend the line, or delete it: each row must be complete on its own."),
    "unreadable rest": ("unreadable rest of a file", "Mend the file at this place: nothing after it was read."),
    "not an object": ("rows that are not objects", 'Write each row as {"instruction": ..., "output": ...}.'),
    "broken characters": ("text that no encoding can hold", "Save as UTF-8; delete the characters that do not show."),
    "too large": ("rows too large for any model", "Cut the row into shorter ones, or delete it."),
    "missing column": ("no question or answer column", "Name the question 'instruction' and the answer 'output'."),
    "empty": ("empty fields", "Fill the field in, or delete the row."),
    "wrong type": ("fields of a wrong type", 'Write the field as text: "42" in quotes, not 42, not a list.'),
    "echo": ("answers that only repeat the question", "Write a real answer, or delete the row."),
    "duplicate": ("exact duplicates", "Delete them: a row that occurs twice is learned twice."),
    "unknown role": ("unknown roles", "Use the roles system, user and assistant."),
    "role order": ("roles in the wrong order", "One system message at most, first; then user and assistant in turns."),
    "ends with user": ("conversations that end with the user", "Add the answer, or delete the last question."),
    "no answer": ("nothing is trained", "Add an assistant message (of weight 1, where messages have weights)."),
    "other form": ("plain text among chats, or the reverse", "Move them to a file of their own and train them apart."),
    "too long": ("answers longer than max_length", "Raise max_length or shorten them; truncate=True keeps them, cut."),
    "nothing left": ("questions that fill max_length alone", "Raise max_length, or shorten the question."),
    "control token": ("text that the model reads as its own marks", "Delete the token, or put a space into it."),
    "template": ("refused by the model's chat template", "Change them (often: no system message), or the model."),
}
WORTH_A_LOOK = {
    "cut": ("answers that will be cut", "Raise max_length: without its end, an answer teaches not to stop."),
    "held out": ("rows that the data itself holds out", "They are not trained on: split() makes them the validation."),
    "near duplicate": ("near duplicates", "Keep the better one of each group; the split keeps them together."),
    "leak": ("validation examples that stand in training", "Delete one: a score on known questions says nothing."),
    "repeated answer": ("one answer to many questions", "Fine for labels; else the model learns to say only this."),
    "mojibake": ("garbled characters (mojibake)", "Read the original in its true encoding and save it as UTF-8."),
    "control characters": ("invisible control characters", "Delete them: the model would learn to write them."),
    "private": ("private data (addresses, phones, keys)", "Replace it: a model can recite what it was trained on."),
}
LONGEST_ROW = 2**24  # characters: 30 times what the longest context windows take
TOO_LONG = Issue("too large", f"it has more than {LONGEST_ROW:,} characters, or a thousand turns")
ISSUE_TYPES = {code: IssueType(*words, rejects=True) for code, words in SET_ASIDE.items()}
ISSUE_TYPES |= {code: IssueType(*words, rejects=False) for code, words in WORTH_A_LOOK.items()}

# UTF-8 read as Latin-1 or Windows-1252 (é as Ã©, a quote as â€™, a mark as ï»¿), and the sign for "not decoded".
MOJIBAKE = re.compile(
    "[ÃÂÐÑØÙ][\u0080-\u00bf€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ]|â[€\u0080-\u009f][\u0080-\u00bf€œ™˜“”¦¢]?|ð[\u009fŸ]|ï»¿|\ufffd"
)
CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\ufeff]")
SURROGATE = re.compile("[\ud800-\udfff]")  # half of a character, or a byte that did not fit the encoding
# Every repetition is bounded or begins in one place only, so that no text, however odd, takes more than linear time.
E_MAIL = re.compile(r"[\w.+-]{1,64}@[\w-]{1,63}\.[\w.-]{0,63}\w")
PHONE = re.compile(
    r"(?<![\w.,-])(?:\+\d(?:[ ./-]?\(?\d\)?){6,14}"  # +44 20 7946 0018
    r"|\(\d{2,5}\) ?\d{3,4}[ .-]?\d{3,4}"  # (555) 010-4477
    r"|\d{3}[.-]\d{3}[.-]\d{4}"  # 555-010-4477
    r"|0\d{2,4}[ /-]\d{3,4}[ -]?\d{3,5})(?![\w-])"  # 0171 5550 1234
)
KEY = re.compile(
    r"(?<![\w-])(?:sk-[\w-]{16,}|hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|AKIA[A-Z0-9]{12,}|AIza[\w-]{20,}"
    r"|xox[abprs]-[\w-]{10,}|eyJ[\w-]{10,2000}\.[\w-]{10,2000}\.[\w-]+)|-----BEGIN [A-Z ]{0,30}PRIVATE KEY-----"
    r"|(?i:\b(?:api[_ -]?key|password|secret)\b\s*[:=]\s*['\"]?[\w!#$%&*-]{8,})"
)
PRIVATE = {"an e-mail address": E_MAIL, "a phone number": PHONE, "a key or password": KEY}


def suspicions(text: str) -> dict[str, str]:
    """Code of an issue -> what was seen, for everything suspicious in a text. Empty for nearly all of them."""
    found = {}
    if not text.isascii() and (garbled := MOJIBAKE.search(text)):
        found["mojibake"] = f"garbled characters {text[max(0, garbled.start() - 8) : garbled.end() + 8]!r}"
    if control := CONTROL.search(text):
        found["control characters"] = f"an invisible character, U+{ord(control[0]):04X}"
    for kind, pattern in PRIVATE.items():
        if (pattern is not E_MAIL or "@" in text) and (private := pattern.search(text)):
            found["private"] = f"{kind} ({private[0][:3]}...)"  # never the whole of it: reports get shared
    return found


def is_broken(text: str) -> bool:
    """Does a text hold half characters, which no file and no tokenizer can take?"""
    return not text.isascii() and SURROGATE.search(text) is not None


PLACES = 5  # places named for each finding
SET_ASIDE_ROW = re.compile(r'$|\{"file": ".*", "line": \d+, "fault": "')  # how a file of them begins, if not empty


class Place(NamedTuple):
    """Where a row stands."""

    file: str
    line: int
    part: str = "train"  # or "validation", or "test"

    def show(self, only_file: bool) -> str:
        """The place, as short as it stays clear."""
        return f"{self.line}" if only_file else f"{Path(self.file).name}:{self.line}"


@dataclass
class Finding:
    """One kind of mistake: how often, where first, and what it looks like there."""

    code: str
    count: int = 0
    places: list[Place] = field(default_factory=list)
    detail: str = ""
    of_one_row: bool = True  # does `detail` describe the first row, and not all of them together?

    def add(self, place: Place, detail: str = "") -> None:
        """One more row that has it."""
        self.count += 1
        self.places = [*self.places, place][:PLACES]
        self.detail = self.detail or detail

    def show(self, only_file: bool) -> str:
        """One line of the report."""
        places = ", ".join(place.show(only_file) for place in self.places) + ", ..." * (self.count > PLACES)
        where = ("line " if self.count == 1 else "lines ") * only_file + places
        first = "first: " if self.count > 1 and self.of_one_row else ""
        detail = f": {first}{self.detail}" if self.detail else ""
        return f"{ISSUE_TYPES[self.code].name} ({where}){detail}. {ISSUE_TYPES[self.code].fix}"


@dataclass(repr=False)
class Report:
    """Everything `check_examples` found out about a source.

    `examples` has what TRL takes, `prompt` and `completion` messages or `text`; `group`, which examples of one row share; and
    `part` ("train", "validation", "test") where the source itself holds rows out.
    """

    source: str
    examples: Dataset
    rejected: list[dict[str, Any]]  # rows set aside: file, line, fault, reason, fix, record
    counts: dict[str, int]  # input (records read) = kept + rejected; examples (one for each answer)
    findings: dict[str, Finding]
    notes: list[str]
    tokens: TokenCheck | None
    stop: str  # why training could not start; empty if it could
    files: list[str]  # that were read

    @property
    def ready(self) -> bool:
        """Could training start with what is left?"""
        return not self.stop

    @property
    def warnings(self) -> list[Finding]:
        """Findings about rows that were kept."""
        return [finding for finding in self.findings.values() if not ISSUE_TYPES[finding.code].rejects]

    def save_rejected(self, path: str | Path = "rejected.jsonl") -> Path:
        """Write the rows that were set aside as JSON lines. Raises DataError where that cannot be, or other data would be lost."""
        path = Path(path)
        try:
            if _holds_other(path, self.files):
                raise FileExistsError("it holds other data")
            with atomic_file(path) as draft, draft.open("w", encoding="utf-8", newline="\n") as stream:
                stream.writelines(as_json(row) + "\n" for row in self.rejected)
        except (OSError, ValueError) as error:  # ValueError: a NUL in the name
            raise DataError(f"{path} is not written ({first_line(error)}). Name another file.") from None
        return path

    def written(self, path: str | Path) -> str:
        """`save_rejected`, and where they are or why they are not: no reason to do without the others."""
        try:
            return f"see {self.save_rejected(path)}"
        except DataError as error:
            return str(error).rstrip(".")

    def __str__(self) -> str:
        c = self.counts
        several = f" as {c['examples']:,} examples" if c["examples"] != c["kept"] else ""
        lines = [f"{self.source}: {c['input']:,} rows read, {c['kept']:,} kept{several}, {c['rejected']:,} set aside"]
        lines.append("Training could start." if self.ready else f"Training cannot start: {self.stop}")
        only_file = len({place.file for finding in self.findings.values() for place in finding.places}) < 2
        found = sorted(self.findings.values(), key=lambda finding: -finding.count)
        for title, rejects in (("Set aside", True), ("Kept, worth a look", False)):
            shown = [finding for finding in found if ISSUE_TYPES[finding.code].rejects == rejects]
            lines += ["", f"{title}:"] if shown else []
            lines += [filled(f"  {finding.count:>6,}  ", finding.show(only_file)) for finding in shown]
        return "\n".join([*lines, "", *(filled("  - ", note) for note in self.notes)])

    __repr__ = __str__  # so that a cell may simply end with the report


def _holds_other(path: Path, sources: list[str]) -> bool:
    """Is it a file that was read, by whatever name, or one that `save_rejected` did not write? Uploads are no files."""
    if path.is_file() and not any(os.path.exists(file) and path.samefile(file) for file in sources):
        with path.open(encoding="utf-8", errors="replace") as stream:
            return not SET_ASIDE_ROW.match(stream.read(4096))
    return path.exists()


def as_json(row: dict[str, Any]) -> str:
    """One row as a line of JSON, whatever it holds: dates and bytes as text, half characters escaped."""
    for as_repr in (False, True):
        try:
            record = repr(row["record"]) if as_repr else row["record"]
            line = json.dumps(row | {"record": record}, ensure_ascii=False, default=str)
            return json.dumps(json.loads(line)) if is_broken(line) else line
        except (TypeError, ValueError, RecursionError):  # keys that are no text, a list that contains itself
            continue
    return json.dumps(row | {"record": None}, default=str)

"""The panel's data section: pick a sample or upload a file, read what the check says, see how long the examples are."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ipywidgets as widgets

from helpers.panel.controls import Menu, Picture, labeled
from helpers.panel.views import div
from helpers.plots import length_chart

if TYPE_CHECKING:
    from helpers.data import Report

SAMPLES, UPLOADS = Path("data_samples"), Path("runs/uploads")
KINDS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".gz")
CHARACTERS_PER_TOKEN = 4  # of English with a usual tokenizer; good to a fifth, until the model's own has counted
FORMAT_TOKENS = 12  # what a chat template adds around one question and one answer
TO_COUNT = "lengths are guessed from characters: the button above counts tokens"
NOT_CHECKED = "Not checked yet: it is large, a folder, or on the Hub. The button above checks it."
MOST_CHECKED_AT_ONCE = 20 * 2**20  # bytes; larger files are checked when the button is pressed


class DataView(widgets.VBox):
    """Control of `config.data`, upload, report and histogram. `changed()` is called when examples or their lengths are new."""

    def __init__(self, control: Menu, choose: Callable[[str], None], changed: Callable[[], None]) -> None:
        self.control, self.choose, self.changed = control, choose, changed
        self.lengths: list[int] = []
        self.counted = False  # by the model's tokenizer, not by characters
        self.checked = ""  # the source that report and lengths speak of
        lesson = "JSON, JSON lines, CSV, TSV or Parquet, up to about 10 MB; of larger files, write the path."
        self.upload = labeled(widgets.FileUpload, "Upload a file", lesson, accept=",".join(KINDS))
        self.upload.observe(self._uploaded, "value")
        lesson = "Counts real tokens, not characters; takes some seconds, and may download the tokenizer."
        self.count = labeled(widgets.Button, "Check with the model's tokenizer", lesson)
        self.report = widgets.HTML(layout={"width": "auto"})
        self.picture = Picture("620px")
        buttons = widgets.Box([self.upload, self.count], layout={"flex_flow": "row wrap"})
        row = widgets.Box([control.box])  # in which the control has its own width and height
        super().__init__([row, buttons, self.report, self.picture])
        self._offer()

    def _offer(self) -> None:
        files = [file for folder in (SAMPLES, UPLOADS) if folder.is_dir() for file in sorted(folder.iterdir())]
        self.control.offer([(file.name, file.as_posix()) for file in files if file.suffix in KINDS])

    def _uploaded(self, change: dict[str, Any]) -> None:
        for name, content in uploads(change["new"]):
            report, text = _checked({name: content})
            if report is None or not report.ready:
                self._tell(text, "Not taken: the config still names the file that it had.")
                continue
            try:
                path = keep(name, content).as_posix()
            except OSError as error:
                self._tell(f"{UPLOADS} cannot be written: {error}. Make room there, then upload again.", "Not taken.")
                continue
            self._offer()
            self._take(path, report, text)
            self.choose(path)
        if change["new"] and isinstance(change["new"], tuple):
            self.upload.value = ()  # so that the same file, once mended, can be uploaded again

    def look(self, source: str) -> None:
        """Check a source if it is another than before: small files at once, others when the button is pressed."""
        if source != self.checked:
            self._take(source, *((None, NOT_CHECKED) if _takes_long(source) else _checked(source)))

    def count_tokens(self, source: str, model: str, max_length: int) -> None:
        """The check with the tokenizer of `model`: tokens are counted, not guessed from characters."""
        self._tell("Reading the tokenizer and counting …")
        self._take(source, *_checked(source, model, max_length))

    def _take(self, source: str, report: Report | None, text: str) -> None:
        """Show what was found out about the config's data, and remember the lengths."""
        tokens = report.tokens if report else None
        self.checked, self.counted = source, tokens is not None
        if tokens is not None:
            self.lengths = tokens.lengths
        else:
            self.lengths = [_guessed_tokens(example) for example in (report.examples if report else [])]
        self._tell(text)
        self.changed()

    def _tell(self, text: str, problem: str = "") -> None:
        self.report.value = (
            f'{div("reason", problem)}<div class="ftk-report" tabindex="0" role="log">{escape(text)}</div>'
        )

    def training_examples(self, validation_share: float = 0.0) -> int | None:
        """How many are left to train on after the split, about; None before the check."""
        return round(len(self.lengths) * (1 - validation_share)) or None

    def coverage(self, max_length: int) -> str:
        """What share of the examples a sequence length holds whole, in words."""
        if not self.lengths:
            return ""
        share = sum(length <= max_length for length in self.lengths) / len(self.lengths)
        return f"covers {'' if self.counted else '≈ '}{int(share * 100)} % of your examples"

    def draw(self, max_length: int) -> None:
        """The histogram, with the line at `max_length`."""
        title = Path(self.checked).name + ("" if self.counted else f", ≈ {CHARACTERS_PER_TOKEN} characters a token")
        self.picture.draw(length_chart(self.lengths, max_length, title=title) if self.lengths else None)


def _guessed_tokens(example: dict[str, Any]) -> int:
    if example.get("text") is not None:
        return len(example["text"]) // CHARACTERS_PER_TOKEN
    messages = [*example["prompt"], *example["completion"]]
    return sum(len(message["content"]) for message in messages) // CHARACTERS_PER_TOKEN + FORMAT_TOKENS


def _checked(source: Any, model: str = "", max_length: int | None = None) -> tuple[Report | None, str]:
    """(the report, its text), or (None, why there is none). Never raises: an error in a callback is seen by nobody."""
    try:
        from helpers.data import check_examples
        from helpers.data.tokens import load_tokenizer

        report = check_examples(source, load_tokenizer(model) if model else None, max_length)
    except Exception as error:  # DataError, a missing package, whatever a broken file or tokenizer may bring up
        return None, str(error) or type(error).__name__
    if not model:  # here it is a button that names the model
        report.notes[:] = [TO_COUNT if note.startswith("tokens were not checked") else note for note in report.notes]
    return report, str(report)


def _takes_long(source: str) -> bool:
    """A folder, a large file, or a data set on the Hub."""
    if os.path.isfile(source):
        return os.path.getsize(source) > MOST_CHECKED_AT_ONCE
    return os.path.isdir(source) or re.fullmatch(r"[\w.-]+(/[\w-]+)+", source) is not None


def uploads(value: Any) -> list[tuple[str, bytes]]:
    """(name, content) of what a FileUpload holds: a dict by name in ipywidgets 7, a tuple of dicts in 8."""
    if isinstance(value, dict):
        return [(name, bytes(file["content"])) for name, file in value.items()]
    return [(file["name"], bytes(file["content"])) for file in value]


def keep(name: str, content: bytes) -> Path:
    """Write an upload to `runs/uploads` under a harmless name; another file of that name is never replaced."""
    UPLOADS.mkdir(parents=True, exist_ok=True)
    harmless = re.sub(r"[^\w.-]+", "_", name.replace("\\", "/").split("/")[-1]).lstrip(".")[-80:] or "upload"
    stem, dot, kind = harmless.partition(".")
    path, number = UPLOADS / harmless, 1
    while path.exists() and path.read_bytes() != content:
        number += 1
        path = UPLOADS / f"{stem}-{number}{dot}{kind}"
    if not path.exists():
        path.write_bytes(content)
    return path

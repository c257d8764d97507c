"""The panel's last section: recorded runs side by side, their curves on one chart, and the settings that differ."""

from __future__ import annotations

import io
from html import escape
from pathlib import Path

import ipywidgets as widgets

from helpers.panel.controls import explain, picture

MOST_ROWS = 8


class CompareView(widgets.VBox):
    """A list of run folders; whatever is chosen is drawn below it."""

    def __init__(self, root: str | Path = "runs") -> None:
        self.root = Path(root)
        self.runs = widgets.SelectMultiple(
            description="runs",
            rows=4,
            layout={"width": "auto", "flex": "1 1 260px", "max_width": "520px", "min_width": "0"},
        )
        self.again = widgets.Button(description="Look for new runs", layout={"width": "auto"})
        explain(
            self.runs,
            "Choose two or more with Ctrl or Shift: training several and comparing them is how settings are found.",
        )
        explain(self.again, "Reads the folder of runs again, after a training.")
        self.note = widgets.HTML(layout={"width": "auto"})
        self.table = widgets.HTML(layout={"width": "auto"})
        self.picture, self.frame = picture("720px")
        self.runs.add_class("ftk-control")
        self.runs.observe(self._draw, "value")
        self.again.on_click(lambda button: self.find())
        super().__init__(
            [widgets.Box([self.runs, self.again], layout={"flex_flow": "row wrap"}), self.note, self.table, self.frame]
        )
        self.find()

    def find(self) -> None:
        """List the run folders, keeping what is chosen."""
        names = sorted(file.parent.name for file in self.root.glob("*/run.json"))
        chosen = tuple(name for name in self.runs.value if name in names)
        if tuple(self.runs.options) != tuple(names):
            self.runs.options = names
            self.runs.rows = max(2, min(MOST_ROWS, len(names)))
        self.runs.value = chosen
        self._draw()

    def _draw(self, change: object = None) -> None:
        names = self.runs.value
        self.table.value, note, shown = "", "", False
        if names:
            shown, note = self._compare([self.root / name for name in names])
        elif self.runs.options:
            note = "Choose two or more with Ctrl or Shift."
        else:
            note = f"No recorded runs in {self.root}/ yet: train first."
        self.frame.layout.display = None if shown else "none"
        self.note.value = f'<div class="ftk-small">{escape(note)}</div>'

    def _compare(self, folders: list[Path]) -> tuple[bool, str]:
        """Draw the runs that can be read. Returns (is anything drawn?, what could not be read and why)."""
        problems = {}
        try:
            found = _compared(folders)
        except Exception:  # a folder that is half written, gone, or from another version: which one?
            problems = {folder: problem for folder in folders if (problem := _problem(folder))}
            folders = [folder for folder in folders if folder not in problems]
            if not folders or not problems:
                return False, _left_out(problems) or "These runs cannot be compared with each other."
            found = _compared(folders)
        self.table.value, self.picture.value = found
        return True, _left_out(problems)


def _compared(folders: list[Path]) -> tuple[str, bytes]:
    """(table as HTML, chart as PNG)."""
    from helpers.comparison import compare_runs

    table, figure = compare_runs(folders)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return (
        f'<div class="ftk-scroll" tabindex="0">{table.to_html(index=False, border=0, na_rep="")}</div>',
        buffer.getvalue(),
    )


def _problem(folder: Path) -> str:
    """Why a run cannot be shown even alone; "" if it can."""
    try:
        _compared([folder])
    except Exception as error:  # whatever a broken folder may bring up
        return f"{type(error).__name__}: {error}"
    return ""


def _left_out(problems: dict[Path, str]) -> str:
    reasons = "; ".join(f"{folder} ({why})" for folder, why in problems.items())
    return (
        f"Left out, because it cannot be read: {reasons}. Delete the folder, or train that run again."
        if reasons
        else ""
    )

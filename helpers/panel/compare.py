"""The panel's last section: recorded runs side by side, their curves on one chart, and the settings that differ."""

from __future__ import annotations

import io
from html import escape
from pathlib import Path

import ipywidgets as widgets

from helpers.panel.controls import explain

MOST_ROWS = 8


class CompareView(widgets.VBox):
    """A list of run folders; whatever is chosen is drawn below it."""

    def __init__(self, root: str | Path = "runs") -> None:
        self.root = Path(root)
        self.runs = widgets.SelectMultiple(
            description="runs", rows=4, layout={"width": "auto", "flex": "1 1 260px", "max_width": "520px", "min_width": "0"}
        )
        self.again = widgets.Button(description="Look for new runs", layout={"width": "auto"})
        explain(self.runs, "Choose two or more with Ctrl or Shift: training several and comparing them is how settings are found.")
        explain(self.again, "Reads the folder of runs again, after a training.")
        self.note = widgets.HTML(layout={"width": "auto"})
        self.table = widgets.HTML(layout={"width": "auto"})
        self.picture = widgets.Image(format="png", layout={"display": "none", "width": "100%", "max_width": "720px"})
        self.runs.add_class("ftk-control")
        self.runs.observe(self._draw, "value")
        self.again.on_click(lambda button: self.find())
        super().__init__(
            [widgets.Box([self.runs, self.again], layout={"flex_flow": "row wrap"}), self.note, self.table, self.picture]
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
        self.table.value, problem = "", ""
        if names:
            problem = self._compare([self.root / name for name in names])
        elif self.runs.options:
            problem = "Choose two or more with Ctrl or Shift."
        else:
            problem = f"No recorded runs in {self.root}/ yet: train first."
        self.picture.layout.display = None if names and not problem else "none"
        self.note.value = f'<div class="ftk-small">{escape(problem)}</div>'

    def _compare(self, folders: list[Path]) -> str:
        from helpers.comparison import compare_runs

        try:
            table, figure = compare_runs(folders)
        except Exception as error:  # a folder that is half written or from another version
            return f"These runs cannot be compared: {type(error).__name__}, {error}."
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=100)
        self.picture.value = buffer.getvalue()
        self.table.value = f'<div class="ftk-scroll" tabindex="0">{table.to_html(index=False, border=0, na_rep="")}</div>'
        return ""

"""The panel's last section: recorded runs side by side, their curves on one chart, and the settings that differ."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import ipywidgets as widgets
import pandas as pd
from matplotlib.figure import Figure

from helpers.hardware import GIB
from helpers.panel.controls import Picture, button, labeled
from helpers.panel.views import div
from helpers.plots import comparison_chart
from helpers.runs import RECORD, Run

MOST_ROWS = 8
HOW_TO_CHOOSE = "Choose two or more with Ctrl or Shift."


def compare_runs(runs: Sequence[Run]) -> tuple[pd.DataFrame, Figure]:
    """(table, chart) of recorded runs: the settings that differ, the best validation loss and its step, time, peak memory."""
    settings = pd.DataFrame([run.settings for run in runs]).drop(columns=["name", "data_sha256"], errors="ignore")
    differing = [field for field in settings if settings[field].map(repr).nunique() > 1]
    rows, histories = [], {}
    for run in runs:
        changed = {field: run.settings.get(field) for field in differing}
        measured = {
            "checkpointing": run.plan.get("checkpointing"),
            "best validation loss": round(run.best_eval_loss, 3) if run.trained else None,
            "at step": run.best_step if run.trained else None,
            "minutes": round(run.seconds / 60, 2),
            "peak GiB": round(run.peak_bytes / GIB, 2),
            "finished": run.finished,
        }
        rows.append({"run": run.folder.name} | changed | measured)
        words = "".join(f", {field} = {value}" for field, value in changed.items())
        histories[run.folder.name + words] = run.history
    return pd.DataFrame(rows), comparison_chart(histories)


class CompareView(widgets.VBox):
    """A list of run folders; whatever is chosen is drawn below it."""

    def __init__(self, root: str | Path = "runs") -> None:
        self.root = Path(root)
        lesson = f"{HOW_TO_CHOOSE} Training several and comparing them is how settings are found."
        layout = {"flex": "1 1 260px", "max_width": "520px"}
        self.runs = labeled(widgets.SelectMultiple, "runs", lesson, layout=layout)
        self.runs.add_class("ftk-control")
        self.runs.observe(lambda change: self._draw(), "value")
        self.again = button("Look for new runs", "Reads the folder of runs again, after a training.", self.find)
        self.note, self.table = widgets.HTML(layout={"width": "auto"}), widgets.HTML(layout={"width": "auto"})
        self.picture = Picture("720px")
        top = widgets.Box([self.runs, self.again], layout={"flex_flow": "row wrap"})
        super().__init__([top, self.note, self.table, self.picture])
        self.find()

    def find(self) -> None:
        """List the run folders, keeping what is chosen."""
        names = sorted(file.parent.name for file in self.root.glob(f"*/{RECORD}"))
        chosen = tuple(name for name in self.runs.value if name in names)
        self.runs.options, self.runs.rows = names, max(2, min(MOST_ROWS, len(names)))
        self.runs.value = chosen
        self._draw()

    def _draw(self) -> None:
        runs, broken, figure, html = [], [], None, ""
        for name in self.runs.value:
            try:
                run = Run.load(self.root / name)
                compare_runs([run])
                runs.append(run)
            except Exception as error:  # half written, gone, from another version: whatever a folder may bring up
                broken.append(f"{self.root / name} ({type(error).__name__}: {error})")
        note = HOW_TO_CHOOSE if self.runs.options else f"No recorded runs in {self.root}/ yet: train first."
        if runs:
            table, figure = compare_runs(runs)
            html = f'<div class="ftk-scroll" tabindex="0">{table.to_html(index=False, border=0, na_rep="")}</div>'
            note = ""
        if broken:
            note = f"Cannot be read: {'; '.join(broken)}. Delete the folder, or train that run again."
        self.note.value = div("small", note)
        self.picture.draw(figure)
        self.table.value = html

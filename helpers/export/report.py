"""The report of a run: one HTML file that opens anywhere, without a server, a script or the network.

write_report(run, evaluation)        # runs/<name>/run_report.html (report.html is the executed notebook)
"""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from helpers.diagnosis import diagnose
from helpers.disk import writing
from helpers.evaluation import Evaluation, worst_first
from helpers.export.card import recorded, versions
from helpers.files import atomic_write
from helpers.hardware import GIB
from helpers.plots import training_chart
from helpers.recipe import total_steps
from helpers.runs import Run

FILE = "run_report.html"
SAMPLES = 6  # worst answers on the page, and half as many of the best; all of them are in evaluation.jsonl


def write_report(run: Run, evaluation: Evaluation | None = None) -> Path:
    """Settings, plan against reality, curves, and what `evaluation` found, if there is one; returns the file.

    What users and models wrote is escaped: the template's autoescape does it for every value.
    """
    plan, png = recorded(run), io.BytesIO()
    training_chart(run.history, planned_bytes=plan.get("peak_bytes") or 0).savefig(png, format="png", dpi=160)
    templates = FileSystemLoader(Path(__file__).parent / "templates")
    environment = Environment(loader=templates, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"gib": lambda size: f"{size / GIB:.2f} GiB", "duration": _duration}
    page = environment.get_template("report.html.j2").render(
        run=run,
        evaluation=evaluation,
        data=Path(run.settings["data"]).name,
        trained=run.trained,
        diagnosis=str(diagnose(run.history)),
        chart=base64.b64encode(png.getvalue()).decode("ascii"),
        planned_steps=total_steps(run.config, plan["training_examples"]) if "training_examples" in plan else None,
        steps=max((event["step"] for event in run.history), default=0),
        versions=versions(),
        mean_scores=_mean_scores(evaluation),
        **_samples(evaluation),
    )
    file = run.folder / FILE
    with writing(file):
        atomic_write(file, page)
    return file


def _mean_scores(evaluation: Evaluation | None) -> str:
    """ "12% → 83%"; empty where the answers were not scored."""
    if evaluation is None or "after_score" not in evaluation.table:
        return ""
    scores = evaluation.table[["before_score", "after_score"]]
    form = ".0%" if scores.stack().between(0, 1).all() else ".3g"
    return " → ".join(f"{mean:{form}}" for mean in scores.mean())


def _samples(evaluation: Evaluation | None) -> dict[str, list[dict[str, Any]]]:
    """Rows of the evaluation's tables: the worst answers, the best of the others, and the most forgotten."""
    answers = [] if evaluation is None else worst_first(evaluation.table).to_dict("records")
    old = evaluation.forgetting if evaluation else None
    forgotten = [] if old is None else worst_first(old.table).to_dict("records")
    best = answers[SAMPLES:][::-1]
    return {"worst": answers[:SAMPLES], "best": best[: SAMPLES // 2], "forgotten": forgotten[: SAMPLES // 2]}


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s"

"""The report of a run: one HTML file that opens anywhere, without a server, a script or the network.

write_report(run, evaluation)        # runs/<name>/run_report.html (report.html is the executed notebook)
"""

from __future__ import annotations

import base64
import io
from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from helpers.diagnosis import verdict
from helpers.evaluation import worst_first
from helpers.files import atomic_write
from helpers.memory import GIB
from helpers.plots import training_chart
from helpers.recipe import total_steps
from helpers.runs import Run

if TYPE_CHECKING:
    from helpers.evaluation import Evaluation


FILE = "run_report.html"
SAMPLES = 6  # of each kind; all of them are in evaluation.jsonl
PACKAGES = ["torch", "transformers", "peft", "trl", "bitsandbytes", "datasets"]
STYLE = (Path(__file__).parent / "report.css").read_text(encoding="utf-8")


def write_report(run: Run, evaluation: Evaluation | None = None) -> Path:
    """Settings, plan against reality, curves, and what `evaluation` found, if there is one."""
    parts = [_head(run), _result(run, evaluation), _curve(run), _plan(run)]
    if evaluation is not None:
        parts += [_samples(evaluation), _forgotten(evaluation)]
    parts.append(_settings(run))
    page = f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(run.folder.name)}: run report</title>
<style>
{STYLE}</style>
<main>
{"".join(parts)}</main>
</html>
"""
    file = run.folder / FILE
    atomic_write(file, page)
    return file


def _head(run: Run) -> str:
    state = "" if run.finished else " <em>Not finished.</em>"
    model, data = escape(run.settings["model"]), escape(Path(run.settings["data"]).name)
    return f"<header><h1>{escape(run.folder.name)}</h1><p>{model}, fine-tuned on {data}.{state}</p></header>\n"


def _result(run: Run, evaluation: Evaluation | None) -> str:
    tiles = []
    if run.evaluations and run.evaluations[-1][0] > 0:
        tiles.append(
            (
                "validation loss",
                f"{run.first_eval_loss:.2f} → {run.best_eval_loss:.2f}",
                f"best at step {run.best_step}",
            )
        )
    if evaluation is not None and "after_score" in evaluation.table:
        before, after = (evaluation.table[f"{when}_score"] for when in ("before", "after"))
        form = "{:.0%} → {:.0%}" if pd.concat([before, after]).between(0, 1).all() else "{:.3g} → {:.3g}"
        tiles.append(
            (evaluation.score_name, form.format(before.mean(), after.mean()), f"on {len(after)} held-out examples")
        )
    if evaluation is not None:
        kinds = f"worse on {evaluation.test.worse}, equal on {evaluation.test.equal}"
        tiles.append(("better answers", f"{evaluation.test.better} of {len(evaluation.table)}", kinds))
    tiles.append(("time", _minutes(run.seconds), f"peak memory {run.peak_bytes / GIB:.1f} GiB"))
    cards = "".join(
        f"<div><h3>{escape(name)}</h3><strong>{escape(number)}</strong><p>{escape(note)}</p></div>"
        for name, number, note in tiles
    )
    said = [] if evaluation is None else evaluation.sentences
    lines = "".join(f"<li>{escape(sentence)}</li>" for sentence in said)
    return f"<section class='tiles'>{cards}</section>\n" + (f"<ul>{lines}</ul>\n" if lines else "")


def _curve(run: Run) -> str:
    buffer = io.BytesIO()
    chart = training_chart(run.history, planned_bytes=run.plan.get("peak_bytes"))
    chart.savefig(buffer, format="png", dpi=160)
    picture = base64.b64encode(buffer.getvalue()).decode("ascii")
    says = escape(str(verdict(run.history)))
    return (
        f"<section><h2>Curves</h2><p>{says[:1].upper()}{says[1:]}.</p><figure><img alt='training and validation loss by optimizer step, "
        f"learning rate, gradient norm, memory' src='data:image/png;base64,{picture}'></figure></section>\n"
    )


def _plan(run: Run) -> str:
    """What was planned beside what was measured. A planned value that was not recorded is left empty, not guessed."""
    plan, done = run.plan, max((event["step"] for event in run.history), default=0)
    steps = _planned_steps(run)
    rows = [
        (
            "peak memory",
            f"{plan['peak_bytes'] / GIB:.2f} GiB" if plan.get("peak_bytes") else "",
            f"{run.peak_bytes / GIB:.2f} GiB",
        ),
        ("optimizer steps", f"{steps}" if steps else "", f"{done}"),
        (
            "whole run",
            _minutes(plan["seconds_per_step"] * steps) if plan.get("seconds_per_step") and steps else "",
            _minutes(run.seconds),
        ),
    ]
    settings = [
        (name.replace("_", " "), plan[name])
        for name in ("card", "dtype", "micro_batch", "accumulation", "checkpointing", "optimizer", "eval_batch")
        if name in plan
    ]
    return (
        f"<section><h2>Plan and reality</h2>{_table(rows, ('', 'planned', 'measured'))}"
        f"<p class='note'>{escape(', '.join(f'{name} {value}' for name, value in settings))}</p></section>\n"
    )


def _planned_steps(run: Run) -> int | None:
    if "training_examples" not in run.plan and run.settings["max_steps"] <= 0:
        return None
    return total_steps(run.config, run.plan.get("training_examples", 0))


def _samples(evaluation: Evaluation) -> str:
    table = worst_first(evaluation.table)
    worst, best = table.head(SAMPLES), table.tail(max(0, min(SAMPLES // 2, len(table) - SAMPLES))).iloc[::-1]
    text = f"<section><h2>Worst first</h2>{''.join(_sample(row) for row in worst.to_dict('records'))}</section>\n"
    if len(best):
        text += f"<section><h2>And the best</h2>{''.join(_sample(row) for row in best.to_dict('records'))}</section>\n"
    return text


def _sample(row: dict[str, Any]) -> str:
    score = f"score {row['before_score']:.3g} → {row['after_score']:.3g}, " if "after_score" in row else ""
    note = f"{score}loss of the reference {row['before_loss']:.2f} → {row['after_loss']:.2f}"
    texts = [("before", row["before"]), ("after", row["after"]), ("reference", row.get("reference"))]
    columns = "".join(
        f"<div><h4>{name}</h4><pre>{escape(text) or '—'}</pre></div>" for name, text in texts if text is not None
    )
    return f"<article><pre class='prompt'>{escape(row['prompt'])}</pre><p class='note'>{note}</p><div class='columns'>{columns}</div></article>"


def _forgotten(evaluation: Evaluation) -> str:
    if evaluation.forgetting is None:
        return ""
    rows = evaluation.forgetting.table.sort_values("after_loss", ascending=False).head(SAMPLES // 2).to_dict("records")
    articles = "".join(_sample(row) for row in rows)
    return f"<section><h2>Everything else</h2><p>{escape(str(evaluation.forgetting))}.</p>{articles}</section>\n"


def _settings(run: Run) -> str:
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    rows = [(name, str(value)) for name, value in run.settings.items()]
    return (
        f"<section><h2>Settings</h2><details><summary>all {len(rows)} of them</summary>{_table(rows)}</details>"
        f"<p class='note'>{escape(versions)}; the numbers are in <code>history.jsonl</code> and <code>evaluation.jsonl</code>.</p></section>\n"
    )


def _table(rows: list[tuple[str, ...]], head: tuple[str, ...] = ()) -> str:
    titles = "<tr>" + "".join(f"<th scope='col'>{escape(cell)}</th>" for cell in head) + "</tr>" if head else ""
    body = "".join(
        "<tr>"
        + f"<th scope='row'>{escape(first)}</th>"
        + "".join(f"<td>{escape(cell)}</td>" for cell in rest)
        + "</tr>"
        for first, *rest in rows
    )
    return f"<table>{titles}{body}</table>"


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s"

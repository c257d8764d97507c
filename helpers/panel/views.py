"""What the panel shows of an `Preview`: HTML for a notebook, text where there is none. Pure functions, no widget.

Colors come from JupyterLab's theme where it has one and are inherited elsewhere, so that all of it reads in light and in dark.
"""

from __future__ import annotations

from html import escape
from textwrap import fill

from helpers.config import TrainConfig
from helpers.hardware import GIB, MIB, Gpu, speed
from helpers.panel.preview import Preview, light
from helpers.plan import budget
from helpers.plots import MUTED, PART_COLORS
from helpers.registry import CATALOG, ModelShape

LIGHTS = {
    "fits": ("#2e9e5b", "●", "fits"),
    "tight": ("#d99a1c", "◐", "tight"),
    "no": ("#d64545", "○", "no"),
    "unknown": ("#7a7a7a", "?", "not modeled"),
}
TEXT_COLUMNS = 120
STYLE = """<style>
.ftk-panel { max-width: 1100px; overflow: hidden; container-type: inline-size; }
.ftk-panel, .ftk-panel .widget-html-content { color: var(--jp-ui-font-color1, inherit); }
.ftk-panel .widget-html-content, .ftk-panel .jupyter-widgets { line-height: 1.4; }
.ftk-panel .widget-html-content { white-space: normal; overflow-wrap: anywhere; }
.ftk-panel .widget-html { height: auto; }
.ftk-plan { font-size: 14px; font-weight: 600; margin: 2px 0 6px; }
.ftk-small, .ftk-hint { font-size: 12px; color: var(--jp-ui-font-color2, inherit); }
.ftk-hint, .ftk-reason { margin: 0 0 4px 8px; }
.ftk-reason, .ftk-problem { color: var(--jp-error-color1, #d64545); font-size: 12.5px; font-weight: 600; }
.ftk-problem { border-left: 4px solid currentColor; padding-left: 8px; margin: 2px 0 6px; }
.ftk-track { position: relative; height: 30px; margin: 20px 0 6px; background: rgba(127,127,127,.16); border-radius: 4px; }
.ftk-parts { display: flex; height: 100%; border-radius: 4px; overflow: hidden; }
.ftk-parts > div { box-sizing: border-box; border-right: 1px solid rgba(255,255,255,.75); }
.ftk-card { position: absolute; top: -4px; bottom: -4px; border-left: 3px dashed currentColor;
  background: var(--jp-layout-color0, Canvas); }
.ftk-card > span { position: absolute; bottom: 100%; white-space: nowrap; font-size: 12px; }
.ftk-legend { display: flex; flex-wrap: wrap; gap: 2px 14px; font-size: 12px; }
.ftk-legend i { display: inline-block; width: 11px; height: 11px; border-radius: 2px; margin-right: 5px; vertical-align: -1px; }
.ftk-report { white-space: pre-wrap; font-family: var(--jp-code-font-family, monospace); font-size: 12px; max-height: 340px;
  overflow: auto; padding: 8px; background: rgba(127,127,127,.10); border-radius: 4px; margin: 4px 0; }
.ftk-scroll { overflow-x: auto; }
.ftk-scroll table { border-collapse: collapse; font-size: 12px; }
.ftk-scroll th, .ftk-scroll td { padding: 3px 9px; border-bottom: 1px solid rgba(127,127,127,.35); text-align: right; white-space: nowrap; }
.ftk-panel .widget-image { height: auto; border-radius: 4px; }
.ftk-panel .ftk-picture { overflow-x: auto; }
.ftk-panel .ftk-picture .widget-image { min-width: 480px; } /* letters of a chart stay readable: scroll it on a telephone */
.ftk-panel .ftk-sections, .ftk-panel .ftk-sections .widget-toggle-buttons { flex-wrap: wrap; height: auto; width: auto; }
@container (max-width: 420px) {
  .ftk-panel .ftk-control .widget-inline-hbox, .ftk-panel .ftk-control.widget-inline-hbox { flex-wrap: wrap; height: auto; }
  .ftk-panel .ftk-control .slider-container { margin-left: 8px; }
  .ftk-panel .ftk-control select { min-height: 28px; }
  .ftk-panel .ftk-control .widget-label { width: 100% !important; text-align: left; }
  .ftk-panel .ftk-control .widget-readout { width: auto; }
}
.ftk-panel :focus-visible { outline: 2px solid var(--jp-brand-color1, #2196f3); outline-offset: 1px; }
</style>"""


def plan_text(preview: Preview) -> str:
    """The chosen plan in one line, in words that need no legend."""
    plan = preview.plan
    if plan is None:
        return preview.problem
    sign = "=" if preview.exact else "≈"
    kept = {"off": "off", "selective": "on, keeping attention's output", "on": "on"}[plan.checkpointing]
    words = [f"micro-batch {plan.micro_batch} x {plan.accumulation} accumulation", f"checkpointing {kept}"]
    if plan.offload:
        words.append("activations wait in host memory")
    if preview.peak_bytes is None:
        words.append("memory not predicted: this model is not modeled")
    else:
        words.append(f"{sign} {_part_of(preview.peak_bytes, plan.budget)}")
    return ", ".join([*words, time_text(preview)])


def amount(size: float) -> str:
    """Bytes as GiB; what would round to nothing as MiB."""
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / MIB:.0f} MiB"


def _part_of(size: float, whole: float) -> str:
    """ "10.9 of 14.1 GiB", or "31 MiB of 14.1 GiB"."""
    return (
        f"{size / GIB:.1f} of {whole / GIB:.1f} GiB" if size >= GIB / 10 else f"{amount(size)} of {whole / GIB:.1f} GiB"
    )


def time_text(preview: Preview) -> str:
    """How long the training will take, and how much that is worth."""
    steps = f"{preview.steps:,} steps" if preview.steps else "an unknown number of steps"
    if preview.seconds is None:
        return f"{steps}; the time is known once ten steps have run"
    minutes = preview.seconds / 60
    length = f"{minutes / 60:.1f} hours" if minutes > 90 else f"{minutes:.0f} minutes" if minutes >= 1.5 else "a minute"
    known = speed(preview.gpu).source.startswith("fitted")
    return f"{steps}, about {length}, " + ("by recorded T4 steps" if known else "not yet measured on this card")


def shortened(preview: Preview, wanted: int) -> str:
    """A warning if the plan had to cut examples."""
    if preview.plan is None or preview.plan.seq_len >= wanted:
        return ""
    return f"at most {preview.plan.seq_len} tokens per example: {wanted} do not fit this card; longer examples would be cut"


def plan_line(preview: Preview, wanted_length: int) -> str:
    """The plan line as HTML, or in plain words why there is none."""
    if preview.plan is None:
        return problem(preview.problem)
    cut = shortened(preview, wanted_length)
    warning = problem(cut) if cut else ""
    return f'<div class="ftk-plan" aria-live="polite">{escape(plan_text(preview))}</div>{warning}'


def memory_bar(preview: Preview) -> str:
    """One stacked bar against the line of what the card can give: the parts of `helpers.plots.memory_chart`, redrawn in no time."""
    card = budget(preview.gpu)
    if preview.memory is None:
        why = "these settings cannot work" if preview.shape else "the formula does not know this model"
        return small(f"No memory bar: {why}.")
    total, peak = preview.memory.total_bytes, preview.peak_bytes
    scale = 100 / (max(card, peak) * 1.03)
    pieces, legend = [], []
    for name, size in sorted(preview.memory.parts.items(), key=lambda part: _order(part[0])):
        share, color = size * peak / total, PART_COLORS.get(name, MUTED)
        label = escape(f"{name}: {amount(share)}", quote=True)
        pieces.append(f'<div style="width:{share * scale:.2f}%;background:{color}" title="{label}"></div>')
        legend.append(f'<span><i style="background:{color}"></i>{label}</span>')
    at = (
        card * scale
    )  # in percent; the line's name is moved back by so much of its own width, and so never leaves the track
    words = f"{_part_of(peak, card)} at the peak, while {preview.memory.peak_moment}"
    return (
        f'<div class="ftk-track" role="img" aria-label="{escape(words, quote=True)}"><div class="ftk-parts">{"".join(pieces)}</div>'
        f'<div class="ftk-card" style="left:{at:.2f}%"><span style="transform:translateX(-{at:.2f}%)">'
        f"{escape(_card_name(preview))}: {card / GIB:.1f} GiB</span></div></div>"
        f'<div class="ftk-legend">{"".join(legend)}</div>'
    )


def _order(name: str) -> int:
    return list(PART_COLORS).index(name) if name in PART_COLORS else len(PART_COLORS)


def _card_name(preview: Preview) -> str:
    return preview.gpu.name.split(",")[0].removeprefix("NVIDIA GeForce ").removeprefix("NVIDIA ")


def trainable_text(preview: Preview) -> str:
    """How much of the model learns."""
    if preview.trainable is None or preview.shape is None:
        return "trainable parameters: not known for this model and these layers"
    whole = preview.shape.parameters()
    return f"trainable: {preview.trainable:,} parameters, {preview.trainable / (whole + preview.trainable):.2%} of {_parameters(whole)}"


def _parameters(number: int) -> str:
    return f"{number / 1e9:.1f}B" if number >= 1e9 else f"{number / 1e6:.0f}M"


def model_line(preview: Preview, light: str) -> str:
    """The chosen model with its traffic light, license and gating."""
    color, _, word = LIGHTS[light]
    row = next((row for row in CATALOG.values() if row.id == preview.model), None)
    rights = "not on the menu: read its card" if row is None else f"license: {row.license}"
    gate = "; gated: accept its license on the Hub first" if row is not None and row.gated else ""
    return (
        f'<div class="ftk-small"><span style="color:{color};font-size:15px" aria-hidden="true">●</span> <b>{word}</b> on '
        f"{escape(_card_name(preview))}: {escape(preview.model)} ({escape(preview.why_model)}); {escape(rights + gate)}</div>"
    )


def menu_label(name: str, light: str) -> str:
    """A line of the model menu: what fits, how big, under which license."""
    row = CATALOG[name]
    _, sign, word = LIGHTS[light]
    license = "license unverified" if row.license == "unverified" else row.license
    return f"{sign} {word} · {name} · {_parameters(row.shape.parameters())} · {license}" + (
        " · gated" if row.gated else ""
    )


def problem(text: str) -> str:
    return f'<div class="ftk-problem" role="alert">{escape(text)}</div>'


def small(text: str) -> str:
    return f'<div class="ftk-small">{escape(text)}</div>'


def reasons(preview: Preview) -> str:
    """Every choice of the planner with its reason."""
    lines = preview.plan.reasons if preview.plan else []
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return (
        f'<div class="ftk-small">What the planner chose, and why:<ul style="margin:2px 0;padding-left:18px">{items}</ul></div>'
        if items
        else ""
    )


def hints(config: TrainConfig, preview: Preview) -> dict[str, str]:
    """Field -> what its present value means."""
    found = {}
    if isinstance(config.max_steps, int) and config.max_steps > 0:
        found["num_train_epochs"] = "not used: the number of steps decides"
    elif preview.steps:
        found["num_train_epochs"] = f"{preview.steps:,} optimizer steps"
    if preview.plan:
        found["effective_batch_size"] = (
            f"micro-batch {preview.plan.micro_batch} x {preview.plan.accumulation} accumulation"
        )
    if isinstance(config.r, int) and config.r > 0 and isinstance(config.lora_alpha, (int, float)):
        found["lora_alpha"] = f"alpha / r = {config.lora_alpha / config.r:g}; 1 to 2 is usual"
    return found


def layer_choices(shape: ModelShape | None) -> list[tuple[str, str]]:
    """(label, names with commas) of the usual choices of layers, by the names that this model gives them."""
    choices = {"all linear layers": "all-linear"}
    if shape is not None:
        names = list(shape.linear_layers())
        attention = [name for name in names if name in ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj")]
        choices["attention"] = ", ".join(attention)
        choices["MLP"] = ", ".join(name for name in names if name not in attention)
        if "q_proj" in names:
            choices["query and value"] = "q_proj, v_proj"
    return [(label if names == "all-linear" else f"{label}: {names}", names) for label, names in choices.items()]


def summary(config: TrainConfig, preview: Preview, light: str, coverage: str) -> str:
    """The whole panel as text."""
    rows = [
        ("card", str(preview.gpu)),
        ("model", f"{preview.model}: {LIGHTS[light][2]} ({preview.why_model})"),
        ("plan", plan_text(preview)),
        ("", shortened(preview, config.max_length)),
        ("learns", trainable_text(preview)),
        ("length", f"{config.max_length} tokens{', ' if coverage else ''}{coverage}"),
    ]
    if preview.memory:
        parts = ", ".join(f"{name} {amount(size)}" for name, size in preview.memory.parts.items())
        rows.append(("memory", f"{parts}; all at once while {preview.memory.peak_moment}"))
    settings = ", ".join(f"{name}={value!r}" for name, value in config.to_dict().items())
    rows += [
        ("config", settings),
        ("change", "config.r = 32, say, in a cell; where widgets work, this is a panel with sliders instead"),
    ]
    return "\n".join(
        fill(text, TEXT_COLUMNS, initial_indent=f"{name:<8}", subsequent_indent=8 * " ", break_long_words=False)
        for name, text in rows
        if text
    )


def model_menu(config: TrainConfig, gpu: Gpu) -> list[tuple[str, str]]:
    """(label with its light, name) of every model, for the panel's menu."""
    rows = [(menu_label(name, light(config, gpu, row)), name) for name, row in CATALOG.items()]
    return [("auto: the best model that fits this card", "auto"), *rows]

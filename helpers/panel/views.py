"""What the panel shows of a `Preview`: HTML for a notebook, text where there is none. Pure functions, no widget."""

from __future__ import annotations

import re
from html import escape
from pathlib import Path
from textwrap import fill

from helpers.config import TrainConfig
from helpers.hardware import GIB, MIB, Gpu, speed
from helpers.menu import fit_status
from helpers.panel.preview import Preview
from helpers.plan import Plan, budget
from helpers.plots import MUTED, PART_COLORS
from helpers.registry import CATALOG, ModelShape, find_row

LIGHTS = {"fits": ("#2e9e5b", "●"), "tight": ("#d99a1c", "◐"), "no": ("#d64545", "○"), "not modeled": ("#7a7a7a", "?")}
TEXT_COLUMNS = 120
STYLE = f"<style>{(Path(__file__).parent / 'panel.css').read_text(encoding='utf-8')}</style>"


def div(kind: str, text: str) -> str:
    """Text as HTML in one of the styles of panel.css; what is wrong is read aloud by screen readers. No text, no element."""
    role = ' role="alert"' if kind in ("reason", "problem") else ""
    return f'<div class="ftk-{kind}"{role}>{escape(text)}</div>' if text else ""


# ------------------------------------------------------------------------------------------------ the plan and its memory


def plan_text(preview: Preview) -> str:
    """The chosen plan in one line, in words that need no legend."""
    plan = preview.plan
    if plan is None:
        return preview.problem
    kept = {"off": "off", "selective": "on, keeping attention's output", "on": "on"}[plan.checkpointing]
    words = [_batch(plan), f"checkpointing {kept}"]
    if plan.offload:
        words.append("activations wait in host memory")
    if plan.peak_bytes is None:
        words.append("memory not predicted: this model is not modeled")
    else:
        words.append(f"{'=' if plan.measured else '≈'} {_part(plan.peak_bytes, plan.budget)}")
    return ", ".join([*words, _time_text(preview)])


def _batch(plan: Plan) -> str:
    return f"micro-batch {plan.micro_batch} x {plan.accumulation} accumulation"


def _amount(size: float) -> str:
    """Bytes as GiB; what would round to nothing as MiB."""
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / MIB:.0f} MiB"


def _part(size: float, whole: float) -> str:
    part = f"{size / GIB:.1f}" if size >= GIB / 10 else _amount(size)
    return f"{part} of {whole / GIB:.1f} GiB"


def _time_text(preview: Preview) -> str:
    """How long the training will take, and how much that is worth."""
    steps = f"{preview.steps:,} steps" if preview.steps else "an unknown number of steps"
    if preview.seconds is None:
        return f"{steps}; the time is known once ten steps have run"
    minutes = preview.seconds / 60
    length = f"{minutes / 60:.1f} hours" if minutes > 90 else f"{minutes:.0f} minutes" if minutes >= 1.5 else "a minute"
    known = speed(preview.gpu).source.startswith("fitted")
    return f"{steps}, about {length}, {'by recorded T4 steps' if known else 'not yet measured on this card'}"


def shortened(preview: Preview, wanted: int) -> str:
    """A warning if the plan had to cut examples."""
    if preview.plan is None or preview.plan.seq_len >= wanted:
        return ""
    return f"at most {preview.plan.seq_len} tokens per example: {wanted} do not fit this card; longer examples would be cut"


def plan_line(preview: Preview, wanted_length: int) -> str:
    """The plan line as HTML, or in plain words why there is none."""
    if preview.plan is None:
        return div("problem", preview.problem)
    line = f'<div class="ftk-plan" aria-live="polite">{escape(plan_text(preview))}</div>'
    return line + div("problem", shortened(preview, wanted_length))


def memory_bar(preview: Preview) -> str:
    """One stacked bar against the line of what the card can give: `helpers.plots.memory_chart`, redrawn in no time."""
    if preview.memory is None:
        why = "these settings cannot work" if preview.shape else "the formula does not know this model"
        return div("small", f"No memory bar: {why}.")
    card, whole, parts = budget(preview.gpu), preview.memory.total_bytes, preview.memory.parts
    peak = (preview.plan and preview.plan.peak_bytes) or whole  # the dry run's, where it has decided
    percent = 100 / (max(card, peak) * 1.03)
    pieces, legend = "", ""
    for name in sorted(parts, key=[*PART_COLORS, *parts].index):
        share, color = parts[name] * peak / whole, PART_COLORS.get(name, MUTED)
        label = escape(f"{name}: {_amount(share)}", quote=True)
        pieces += f'<div style="width:{share * percent:.2f}%;background:{color}" title="{label}"></div>'
        legend += f'<span><i style="background:{color}"></i>{label}</span>'
    words = f"{_part(peak, card)} at the peak, while {preview.memory.peak_moment}"
    at = f"{card * percent:.2f}%"  # the card's name is moved back by so much of its own width: it stays on the track
    return (
        f'<div class="ftk-track" role="img" aria-label="{escape(words, quote=True)}">'
        f'<div class="ftk-parts">{pieces}</div><div class="ftk-card" style="left:{at}">'
        f'<span style="transform:translateX(-{at})">{escape(_card_name(preview.gpu))}: {card / GIB:.1f} GiB</span></div>'
        f'</div><div class="ftk-legend">{legend}</div>'
    )


def _card_name(gpu: Gpu) -> str:
    return gpu.name.split(",")[0].removeprefix("NVIDIA GeForce ").removeprefix("NVIDIA ")


def reasons(preview: Preview) -> str:
    """Every choice of the planner with its reason."""
    if preview.plan is None:
        return ""
    items = "".join(f"<li>{escape(line)}</li>" for line in preview.plan.reasons)
    return f'<div class="ftk-small">What the planner chose, and why:<ul>{items}</ul></div>'


# ------------------------------------------------------------------------------------------------ the model and its adapter


def trainable_text(preview: Preview) -> str:
    """How much of the model learns."""
    if preview.trainable is None or preview.shape is None:
        return "trainable parameters: not known for this model and these layers"
    whole = preview.shape.parameters()
    share = preview.trainable / (whole + preview.trainable)
    return f"trainable: {preview.trainable:,} parameters, {share:.2%} of {_parameters(whole)}"


def _parameters(number: int) -> str:
    return f"{number / 1e9:.1f}B" if number >= 1e9 else f"{number / 1e6:.0f}M"


def model_line(preview: Preview) -> str:
    """The chosen model with its traffic light, license and gating."""
    row = find_row(preview.model)
    rights = f"license: {row.license}" if row else "not on the menu: read its card"
    gate = "; gated: accept its license on the Hub first" if row and row.gated else ""
    words = f"{_card_name(preview.gpu)}: {preview.model} ({preview.why_model}); {rights}{gate}"
    sign = f'<span style="color:{LIGHTS[preview.light][0]};font-size:15px" aria-hidden="true">●</span>'
    return f'<div class="ftk-small">{sign} <b>{preview.light}</b> on {escape(words)}</div>'


def model_menu(config: TrainConfig, gpu: Gpu) -> list[tuple[str, str]]:
    """(label with its traffic light, name) of every model: what fits, how big, under which license."""
    menu = [("auto: the best model that fits this card", "auto")]
    for name, row in CATALOG.items():
        light = fit_status(config, gpu, row)[0]
        words = [f"{LIGHTS[light][1]} {light}", name, _parameters(row.shape.parameters()), row.license]
        menu.append((" · ".join([*words, "gated"] if row.gated else words), name))
    return menu


def layer_choices(shape: ModelShape | None) -> list[tuple[str, str]]:
    """(label, names with commas) of the usual choices of layers, by the names that this model gives them."""
    names = list(shape.linear_layers()) if shape else []
    attention = [name for name in names if name in ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj")]
    choices = {"attention": attention, "MLP": [name for name in names if name not in attention]}
    if "q_proj" in names:
        choices["query and value"] = ["q_proj", "v_proj"]
    written = {label: ", ".join(layers) for label, layers in choices.items() if layers}
    return [("all linear layers", "all-linear"), *((f"{label}: {text}", text) for label, text in written.items())]


# ------------------------------------------------------------------------------------------------ the settings


def hints(config: TrainConfig, preview: Preview) -> dict[str, str]:
    """Setting -> what its present value means."""
    found = {"lora_alpha": f"alpha / r = {config.lora_alpha / config.r:g}; 1 to 2 is usual"}
    if config.max_steps > 0:
        found["num_train_epochs"] = "not used: the number of steps decides"
    elif preview.steps:
        found["num_train_epochs"] = f"{preview.steps:,} optimizer steps"
    if preview.plan:
        found["effective_batch_size"] = _batch(preview.plan)
    return found


def faults(config: TrainConfig, preview: Preview) -> dict[str, str]:
    """Setting -> why it cannot work: by the config's own rules, else by the planner's, whose message begins with its name."""
    return config.problems() or {re.split("[=:]", preview.problem)[0]: preview.problem}


def summary(config: TrainConfig, preview: Preview, coverage: str) -> str:
    """The whole panel as text."""
    memory, parts = preview.memory, preview.memory.parts.items() if preview.memory else []
    sizes = ", ".join(f"{name} {_amount(size)}" for name, size in parts)
    lines = [
        f"card    {preview.gpu}",
        f"model   {preview.model}: {preview.light} ({preview.why_model})",
        f"plan    {plan_text(preview)}",
        *([f"        {cut}"] if (cut := shortened(preview, config.max_length)) else []),
        f"learns  {trainable_text(preview)}",
        f"length  {config.max_length} tokens, {coverage or 'the data was not checked'}",
        f"memory  {sizes}; all at once while {memory.peak_moment}" if memory else "memory  not known",
        f"config  {', '.join(f'{name}={value!r}' for name, value in config.to_dict().items())}",
        "change  config.r = 32, say, in a cell; where widgets work, this is a panel with sliders instead",
    ]
    return "\n".join(fill(line, TEXT_COLUMNS, subsequent_indent=8 * " ", break_long_words=False) for line in lines)

"""The panel's controls: one line of `CONTROLS` for each field of the config.

To add a control, add a field with its docstring to `TrainConfig` and a line here. A control shows any value that the field can have,
also one that no learner could pick with it: its range grows, the config is never bent to fit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from html import escape
from typing import Any

import ipywidgets as widgets

from helpers.panel.settings import FIELDS, field_lessons

LAYOUT = {"width": "auto", "min_width": "0"}
STYLE = {"description_width": "128px"}
WIDEST = "640px"


def explain(widget: widgets.Widget, lesson: str) -> None:
    """Set a tooltip, by the name that it has in ipywidgets 7 or in 8."""
    setattr(widget, "tooltip" if widget.has_trait("tooltip") else "description_tooltip", lesson)


def picture(width: str) -> tuple[widgets.Image, widgets.Box]:
    """(a chart's image, its frame, hidden until there is something to show)."""
    image = widgets.Image(format="png", layout={"width": "100%", "max_width": width})
    frame = widgets.Box([image], layout={"display": "none", "width": "auto"})
    frame.add_class("ftk-picture")
    return image, frame


class Control:
    """A field's widget with a line below it for reasons. Subclasses say which widget, and how a value gets in and out."""

    width = "300px"  # below which a control goes to a line of its own

    def __init__(self, row: Row, edited: Callable[[str, Any], None]) -> None:
        self.row, self.edited, self.lesson = row, edited, field_lessons()[row.field]
        self.showing = False  # True while the panel, and not the user, moves the widget
        self.hint = self.reason = ""
        self.inputs = self.build()
        self.note = widgets.HTML(layout={"display": "none", "width": "auto", "margin": "0"})
        for widget in self.inputs:
            explain(widget, self.lesson)
            widget.observe(self.moved, "value")
        self.box = widgets.VBox(
            [*self.inputs, self.note], layout={"flex": f"1 1 {self.width}", "min_width": "0", "max_width": WIDEST}
        )
        self.box.add_class("ftk-control")

    def build(self) -> list[widgets.Widget]:
        raise NotImplementedError

    def put(self, value: Any) -> None:
        """Move the widget to `value`, whatever it is."""
        raise NotImplementedError

    def read(self) -> Any:
        return self.inputs[0].value

    def moved(self, change: dict[str, Any]) -> None:
        if not self.showing:
            self.edited(self.row.field, self.read())

    def show(self, value: Any) -> None:
        """Show the config's value. A widget that already says so is left alone: a user may be dragging it."""
        self.showing = True
        try:
            if self.read() != value:
                self.put(value)
        except (ValueError, TypeError, OverflowError, widgets.trait_types.traitlets.TraitError):
            self.say(reason=f"{self.row.field}={value!r} cannot be shown here.")
        finally:
            self.showing = False

    def say(self, hint: str | None = None, reason: str | None = None, lessons: bool = False) -> None:
        """What stands under the control: why a value does not work, else what it means, and on request what the field is."""
        self.hint = self.hint if hint is None else hint
        self.reason = self.reason if reason is None else reason
        lines = [
            f'<div class="ftk-reason" role="alert">{escape(self.reason)}</div>' if self.reason else "",
            f'<div class="ftk-hint">{escape(self.hint)}</div>' if self.hint else "",
            f'<div class="ftk-hint">{escape(self.lesson)}</div>' if lessons else "",
        ]
        text = "".join(lines)
        if self.note.value != text:
            self.note.value = text
            self.note.layout.display = None if text else "none"

    def enable(self, enabled: bool) -> None:
        for widget in self.inputs:
            if widget.disabled == enabled:
                widget.disabled = not enabled


class Stops(Control):
    """A slider over the values that are worth trying; any other value of the config becomes a stop of its own.

    Stops, because sliders over a range round what they are given to their step: they would show a value that the config has not.
    """

    def build(self) -> list[widgets.Widget]:
        return [widgets.SelectionSlider(options=self.options(), description=self.row.label, style=STYLE, layout=LAYOUT)]

    def options(self, *also: float) -> list[tuple[str, float]]:
        values = sorted({*self.row.values, *also})
        return [(self.row.words.get(value) or self.row.written(value), value) for value in values]

    def put(self, value: Any) -> None:
        if not isinstance(value, (int, float)) or isinstance(value, bool) or value != value:
            raise ValueError(value)
        slider = self.inputs[0]
        with slider.hold_sync():
            if value not in [stop for _, stop in slider.options]:
                slider.options = self.options(value)
            slider.value = value


class Choice(Control):
    """A menu of everything that works; a value of the config that is not on it is added."""

    def build(self) -> list[widgets.Widget]:
        self.offered = [(self.row.words.get(value, str(value)), value) for value in self.row.values]
        return [widgets.Dropdown(options=self.offered, description=self.row.label, style=STYLE, layout=LAYOUT)]

    def offer(self, options: Sequence[tuple[str, Any]]) -> None:
        """Replace what can be chosen, keeping what is chosen."""
        self.offered = list(options)
        self._fill(self.inputs[0].value)

    def put(self, value: Any) -> None:
        self._fill(value)

    def _fill(self, value: Any) -> None:
        menu, options = self.inputs[0], list(self.offered)
        if value not in [option for _, option in options]:
            options.append((str(value), value))
        was_showing, self.showing = self.showing, True
        with menu.hold_sync():
            if list(menu.options) != options:
                menu.options = options
            if menu.value != value:
                menu.value = value
        self.showing = was_showing


class Menu(Choice):
    """A menu, and a line to write what is not on it. Lists of names are written with commas."""

    width = "480px"  # its lines are long

    def offer(self, options: Sequence[tuple[str, Any]]) -> None:
        super().offer(options)
        self._write(self.inputs[0].value)

    def build(self) -> list[widgets.Widget]:
        line = widgets.Text(
            placeholder=self.row.words["other"],
            continuous_update=False,
            layout=LAYOUT,
            description="or write",
            style=STYLE,
        )
        self.offered = [(value, value) for value in self.row.values]
        menu = widgets.Dropdown(options=self.offered, description=self.row.label, style=STYLE, layout=LAYOUT)
        return [menu, line]

    def read(self) -> Any:
        return self.row.parse(self.inputs[0].value or "")

    def put(self, value: Any) -> None:
        text = value if isinstance(value, str) else ", ".join(map(str, value))
        self._fill(text)
        self._write(text)

    def _write(self, text: str | None) -> None:
        """Into the line goes only what is not on the menu."""
        was_showing, self.showing = self.showing, True
        self.inputs[1].value = "" if text in [None, *(option for _, option in self.offered)] else text
        self.showing = was_showing

    def moved(self, change: dict[str, Any]) -> None:
        if self.showing or not str(change["new"] or "").strip():
            return
        self.edited(self.row.field, self.row.parse(change["new"]))


class Line(Control):
    """A line of text."""

    def build(self) -> list[widgets.Widget]:
        return [widgets.Text(description=self.row.label, continuous_update=False, style=STYLE, layout=LAYOUT)]

    def put(self, value: Any) -> None:
        self.inputs[0].value = str(value)


class Whole(Control):
    """A whole number to type."""

    def build(self) -> list[widgets.Widget]:
        return [widgets.IntText(description=self.row.label, continuous_update=False, style=STYLE, layout=LAYOUT)]

    def put(self, value: Any) -> None:
        if int(value) != value:
            raise ValueError(value)
        self.inputs[0].value = int(value)


def plainly(number: float) -> str:
    """1000 -> "1,000", 1.0 -> "1"; every digit that the number has."""
    return f"{number:,}" if isinstance(number, int) else repr(number).removesuffix(".0")


def in_powers(number: float) -> str:
    """0.0002 -> "2e-4"; every digit that the number has."""
    return f"{Decimal(repr(number)).normalize():e}"


def _names(text: str) -> str | list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    return names[0] if names == ["all-linear"] else names


@dataclass(frozen=True)
class Row:
    """One control: which field, in which section, under which label, as what, over which values."""

    field: str
    section: str
    label: str
    kind: type[Control]
    values: tuple[Any, ...] = ()
    words: dict[Any, str] = field(default_factory=dict)
    """How a value is called, where its number says too little; "other" is what a line for free text asks for."""
    parse: Callable[[str], Any] = str.strip
    written: Callable[[float], str] = plainly


PARTS = (0.0, 0.01, 0.02, 0.03, 0.05, 0.08, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4)
LEARNING_RATES = (*(float(f"{digits}e{power}") for power in range(-6, -2) for digits in (1, 1.5, 2, 3, 5, 7)), 1e-2)
CONTROLS = [
    Row("model", "Model", "model", Menu, ("auto",), {"other": "a folder, or any Hub id"}),
    Row(
        "quantization",
        "Model",
        "base weights",
        Choice,
        ("nf4", "none"),
        {"nf4": "4-bit NF4 (QLoRA)", "none": "16-bit (plain LoRA)"},
    ),
    Row("r", "LoRA", "rank r", Stops, (1, 2, 4, 8, 16, 32, 64, 128, 256)),
    Row("lora_alpha", "LoRA", "alpha", Stops, (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)),
    Row("lora_dropout", "LoRA", "dropout", Stops, PARTS),
    Row("target_modules", "LoRA", "which layers", Menu, ("all-linear",), {"other": "names, with commas"}, _names),
    Row("learning_rate", "Training", "learning rate", Stops, LEARNING_RATES, written=in_powers),
    Row("num_train_epochs", "Training", "epochs", Stops, (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 10.0)),
    Row("max_steps", "Training", "or steps", Stops, (-1, 10, 20, 50, 100, 200, 500, 1000, 2000), {-1: "by epochs"}),
    Row("effective_batch_size", "Training", "effective batch", Stops, (1, 2, 4, 8, 16, 32, 64, 128)),
    Row(
        "max_length",
        "Training",
        "sequence length",
        Stops,
        (128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 8192),
    ),
    Row("warmup_ratio", "Training", "warmup", Stops, PARTS),
    Row("lr_scheduler_type", "Training", "scheduler", Choice, ("cosine", "linear", "constant_with_warmup")),
    Row("early_stopping_patience", "Training", "early stopping", Stops, (0, 1, 2, 3, 4, 5, 6, 8, 10), {0: "off"}),
    Row("validation_share", "Training", "validation share", Stops, PARTS[4:]),
    Row("num_evaluations", "Training", "evaluations", Stops, (1, 2, 4, 6, 8, 12, 16, 24, 32)),
    Row("max_eval_samples", "Training", "examples each", Stops, (8, 16, 24, 32, 48, 64, 128, 256, 512)),
    Row("seed", "Training", "seed", Whole),
    Row("name", "Training", "run name", Line),
    Row(
        "gradient_checkpointing",
        "Memory",
        "checkpointing",
        Choice,
        ("auto", "on", "off"),
        {"auto": "auto: only if memory needs it"},
    ),
    Row("micro_batch_size", "Memory", "micro-batch", Choice, (0,), {0: "the planner chooses"}),
    Row("data", "Data", "data", Menu, (), {"other": "a path, or a data set on the Hub"}),
]
assert {row.field for row in CONTROLS} == set(FIELDS), "every field of the config has one control"

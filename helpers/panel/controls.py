"""The panel's controls: one line of `CONTROLS` for each field of the config, with its widget and the steps worth trying.

To add a control, add a field to `TrainConfig` and a line here. A control shows any value that the field can have, also one that no
learner could pick with it: its range grows, the config is never bent to fit.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from types import MappingProxyType
from typing import Any, NamedTuple

import ipywidgets as widgets
from matplotlib.figure import Figure

from helpers.panel.settings import FIELDS
from helpers.panel.views import div

STYLE = {"description_width": "128px"}
WIDEST = "640px"
Options = Sequence[tuple[str, Any]]


def labeled(kind: type[widgets.Widget], label: str, lesson: str, **traits: Any) -> widgets.Widget:
    """A widget with its label, and with a tooltip, by the name that this has in ipywidgets 7 or in 8."""
    layout = {"width": "auto", "min_width": "0"} | traits.pop("layout", {})
    tooltip = "tooltip" if "tooltip" in kind.class_trait_names() else "description_tooltip"
    return kind(description=label, layout=layout, **{tooltip: lesson}, **traits)


def button(label: str, lesson: str, pressed: Callable[[], Any], icon: str = "") -> widgets.Button:
    """A button with its tooltip, and what it does."""
    made = labeled(widgets.Button, label, lesson, icon=icon)
    made.on_click(lambda _: pressed())
    return made


def select(widget: widgets.Widget, options: Options, value: Any) -> None:
    """Show `value` among `options`, in one message to the browser; options that are there already are left alone."""
    with widget.hold_sync():
        if list(widget.options) != list(options):
            widget.options = options
        widget.value = value


class Picture(widgets.Box):
    """A chart, hidden until there is one."""

    def __init__(self, width: str) -> None:
        self.image = widgets.Image(format="png", layout={"width": "100%", "max_width": width})
        super().__init__([self.image], layout={"display": "none", "width": "auto"})
        self.add_class("ftk-picture")

    def draw(self, figure: Figure | None) -> None:
        """Show the figure, or nothing."""
        if figure:
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", dpi=100)
            self.image.value = buffer.getvalue()
        self.layout.display = None if figure else "none"


class Control:
    """A field's widget with a line below it for reasons. This one is typed into; subclasses offer what is worth choosing."""

    width = "300px"  # below which a control goes to a line of its own

    def __init__(self, row: Row, edited: Callable[[str, Any], None]) -> None:
        self.row, self.field, self.edited = row, FIELDS[row.field], edited
        self.lesson = self.field.metadata["help"]
        self.showing = False  # True while the panel, and not the user, moves the widget
        self.hint = self.reason = ""
        self.inputs = self._build()  # the first one shows the value
        self.note = widgets.HTML(layout={"display": "none", "width": "auto", "margin": "0"})
        for widget in self.inputs:
            widget.observe(self._moved, "value")
        layout = {"flex": f"1 1 {self.width}", "min_width": "0", "max_width": WIDEST}
        self.box = widgets.VBox([*self.inputs, self.note], layout=layout)
        self.box.add_class("ftk-control")

    def _build(self) -> list[widgets.Widget]:
        kind = widgets.IntText if self.field.type == "int" else widgets.Text
        return [self._labeled(kind, continuous_update=False)]

    def _labeled(self, kind: type[widgets.Widget], label: str = "", **traits: Any) -> widgets.Widget:
        return labeled(kind, label or self.row.label, self.lesson, style=STYLE, **traits)

    def _put(self, value: Any) -> None:
        self.inputs[0].value = value

    def _moved(self, change: dict[str, Any]) -> None:
        if not self.showing:
            self.edited(self.row.field, self.read())

    def read(self) -> Any:
        """The value that the widget shows."""
        return self.inputs[0].value

    def show(self, value: Any) -> None:
        """Show a value that the field can have. A widget that already shows it is not touched: a user may be dragging it."""
        self.showing = True
        self._put(value)
        self.showing = False

    def say(self, hint: str, reason: str, lessons: bool) -> None:
        """What stands under the control: why a value does not work, what it means, and on request what the field is."""
        self.hint, self.reason = hint, reason
        text = div("reason", reason) + div("hint", hint) + div("hint", self.lesson if lessons else "")
        if self.note.value != text:
            self.note.value = text
            self.note.layout.display = None if text else "none"


class Stops(Control):
    """A slider over the values that are worth trying; any other value of the config becomes a stop of its own.

    Stops, because sliders over a range round what they are given to their step: they would show a value that the config has not.
    """

    def _build(self) -> list[widgets.Widget]:
        return [self._labeled(widgets.SelectionSlider, options=self._options())]

    def _options(self, *also: float) -> Options:
        values = sorted({*self.row.values, *also})
        return [(self.row.words.get(value) or written(value), value) for value in values]

    def _put(self, value: Any) -> None:
        slider = self.inputs[0]
        there = value in [stop for _, stop in slider.options]
        select(slider, slider.options if there else self._options(value), value)


class Choice(Control):
    """A menu of what works; a value of the config that is not on it is added."""

    def _build(self) -> list[widgets.Widget]:
        values = self.row.values or self.field.metadata.get("choices", ())
        self.offered: Options = [(self.row.words.get(value, str(value)), value) for value in values]
        return [self._labeled(widgets.Dropdown, options=self.offered)]

    def offer(self, options: Options) -> None:
        """Replace what can be chosen, keeping what is chosen."""
        self.offered = options
        self.show(self.read())

    def _put(self, value: Any) -> None:
        there = value in [option for _, option in self.offered]
        select(self.inputs[0], [*self.offered, *([] if there else [(str(value), value)])], value)


class Menu(Choice):
    """A menu, and a line to write what is not on it. Lists of names are written with commas."""

    width = "480px"  # its lines are long

    def _build(self) -> list[widgets.Widget]:
        line = self._labeled(widgets.Text, "or write", placeholder=self.row.words["other"], continuous_update=False)
        return [*super()._build(), line]

    def _put(self, value: Any) -> None:
        text = value if isinstance(value, str) else ", ".join(map(str, value))
        super()._put(text)
        on_menu = text in [option for _, option in self.offered]
        self.inputs[1].value = "" if on_menu else text

    def _moved(self, change: dict[str, Any]) -> None:
        if not self.showing and str(change["new"] or "").strip():  # an emptied line says nothing
            self.edited(self.row.field, self._parse(change["new"]))

    def read(self) -> Any:
        """The value that the menu shows, as the config has it."""
        return self._parse(self.inputs[0].value or "")

    def _parse(self, text: str) -> str | list[str]:
        names = [name.strip() for name in text.split(",") if name.strip()]
        return text.strip() if self.field.type == "str" or names == ["all-linear"] else names


def written(number: float) -> str:
    """1000 -> "1,000", 1.0 -> "1", 0.0002 -> "2e-4"; every digit that the number has."""
    if isinstance(number, int):
        return f"{number:,}"
    return f"{Decimal(str(number)).normalize():e}" if 0 < number < 0.01 else str(number).removesuffix(".0")


class Row(NamedTuple):
    """One control: which field, in which section, under which label, as which widget, over which values."""

    field: str
    section: str
    label: str
    kind: type[Control]
    values: tuple[Any, ...] = ()  # steps worth trying; without any, a menu offers the choices that the field declares
    words: Mapping[Any, str] = MappingProxyType({})  # what values are called; "other": what a line asks for


PARTS = (0.0, 0.01, 0.02, 0.03, 0.05, 0.08, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4)
POWERS_OF_TWO = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
LENGTHS = (128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 8192)
LEARNING_RATES = (*(float(f"{digits}e{power}") for power in range(-6, -2) for digits in (1, 1.5, 2, 3, 5, 7)), 1e-2)
WEIGHTS = {"nf4": "4-bit NF4 (QLoRA)", "none": "16-bit (plain LoRA)"}
CHECKPOINTING = {"auto": "auto: only if memory needs it"}
CONTROLS = [
    Row("model", "Model", "model", Menu, ("auto",), {"other": "a folder, or any Hub id"}),
    Row("quantization", "Model", "base weights", Choice, words=WEIGHTS),
    Row("r", "LoRA", "rank r", Stops, POWERS_OF_TWO[:-1]),
    Row("lora_alpha", "LoRA", "alpha", Stops, POWERS_OF_TWO),
    Row("lora_dropout", "LoRA", "dropout", Stops, PARTS),
    Row("target_modules", "LoRA", "which layers", Menu, ("all-linear",), {"other": "names, with commas"}),
    Row("learning_rate", "Training", "learning rate", Stops, LEARNING_RATES),
    Row("num_train_epochs", "Training", "epochs", Stops, (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 10.0)),
    Row("max_steps", "Training", "or steps", Stops, (-1, 10, 20, 50, 100, 200, 500, 1000, 2000), {-1: "by epochs"}),
    Row("effective_batch_size", "Training", "effective batch", Stops, POWERS_OF_TWO[:-2]),
    Row("max_length", "Training", "sequence length", Stops, LENGTHS),
    Row("warmup_ratio", "Training", "warmup", Stops, PARTS),
    Row("lr_scheduler_type", "Training", "scheduler", Choice),
    Row("early_stopping_patience", "Training", "early stopping", Stops, (0, 1, 2, 3, 4, 5, 6, 8, 10), {0: "off"}),
    Row("validation_share", "Training", "validation share", Stops, PARTS[4:]),
    Row("num_evaluations", "Training", "evaluations", Stops, (1, 2, 4, 6, 8, 12, 16, 24, 32)),
    Row("max_eval_samples", "Training", "examples each", Stops, (8, 16, 24, 32, 48, 64, 128, 256, 512)),
    Row("seed", "Training", "seed", Control),
    Row("name", "Training", "run name", Control),
    Row("gradient_checkpointing", "Memory", "checkpointing", Choice, words=CHECKPOINTING),
    Row("micro_batch_size", "Memory", "micro-batch", Choice, (0,), {0: "the planner chooses"}),
    Row("data", "Data", "data", Menu, words={"other": "a path, or a data set on the Hub"}),
]
assert {row.field for row in CONTROLS} == set(FIELDS), "every field of the config has one control"

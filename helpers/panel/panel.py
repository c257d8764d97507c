"""The control panel: every setting under your fingers, and what it means for your card while you move it.

    control_panel(config)               # edits `config` in place; the next cell trains

Data flows one way: widget -> config -> formula -> views. Back to the widgets it goes only by `refresh`: after undo, reset or a preset,
or when you have edited the config yourself. Nothing is trained in here. Core ipywidgets only, so it works with 7.7.1 (Colab) and 8;
where there is no notebook, the same is printed as text.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

import ipywidgets as widgets

from helpers.code_view import as_code
from helpers.config import TrainConfig
from helpers.hardware import KNOWN_GPUS, Gpu
from helpers.panel import views
from helpers.panel.compare import CompareView
from helpers.panel.controls import CONTROLS, STYLE, WIDEST, Control, explain
from helpers.panel.data import DataView
from helpers.panel.presets import PRESETS
from helpers.panel.preview import Preview, light_of, preview_of, reachable_hub, this_machine
from helpers.panel.settings import Settings, by_field, problems, usable
from helpers.panel.views import model_menu

SECTIONS = ("Model", "LoRA", "Training", "Memory", "Data", "Compare", "Code")
PAUSE = 0.3  # seconds without a move, after which the slower views follow: traffic lights of the whole menu, histogram, code
WRAPPED = {"flex_flow": "row wrap", "width": "auto"}
_PANELS: deque[ControlPanel] = deque(maxlen=4)  # the newest; panels on one config follow each other


def control_panel(config: TrainConfig, gpu: Gpu | None = None) -> ControlPanel:
    """A widget that edits `config` in place and shows what each change means. Without a notebook, prints the same as text.

    Args:
        gpu: the card to plan for at first. Default: what this machine has.
    """
    panel = ControlPanel(config, gpu)
    if not _has_kernel():
        print(panel.summary())
    return panel


def _has_kernel() -> bool:
    from IPython import get_ipython

    return getattr(get_ipython(), "kernel", None) is not None


class ControlPanel(widgets.VBox):
    """The panel. `refresh()` shows a config that was edited elsewhere; `preview` is what its views show."""

    def __init__(self, config: TrainConfig, gpu: Gpu | None = None) -> None:
        self.config, self.settings = config, Settings(config)
        machine, label = (gpu, str(gpu)) if gpu else this_machine()
        self.cards = {label: machine} | KNOWN_GPUS
        self.preview: Preview | None = None
        self._exact_for: Any = None
        self._lights_for: Any = None
        self._pending: asyncio.TimerHandle | None = None

        self.controls = {row.field: row.kind(row, self._edited) for row in CONTROLS}
        self.plan_view, self.bar_view = _html(flex="1 1 320px", width="auto", min_width="0"), _html()
        self.model_view, self.share_view, self.reasons_view = _html(), _html(), _html()
        self.card = widgets.Dropdown(
            options=list(self.cards), description="plan for", style=STYLE, layout={"width": "auto", "max_width": WIDEST}
        )
        self.exact = widgets.Button(description="Exact", icon="check", layout={"width": "auto"})
        self.code = widgets.Textarea(rows=16, layout={"width": "auto"})
        self.data = DataView(self.controls["data"], lambda path: self._edited("data", path), self._data_changed)
        self.compare = CompareView()
        super().__init__(self._assemble())
        self.add_class("ftk-panel")
        self._wire()
        _PANELS.append(self)
        self.refresh()
        self._redraw_slowly()  # whoever opens it sees the whole menu at once

    # ------------------------------------------------------------------------------------------------ assembling

    def _assemble(self) -> list[widgets.Widget]:
        self.preset_buttons = {name: _button(preset.label, preset.lesson) for name, preset in PRESETS.items()}
        self.undo = _button("Undo", "Takes back the last move, as often as you like.", "undo")
        self.reset = _button("Reset", "Everything as it was when this panel was made. Undo brings it back.", "refresh")
        self.lessons = widgets.ToggleButton(description="Explain", icon="question", layout={"width": "auto"})
        self.chooser = widgets.ToggleButtons(options=SECTIONS, value="Model", style={"button_width": "auto"})
        self.chooser.add_class("ftk-sections")
        self.card.add_class("ftk-control")
        for widget, lesson in [
            (self.card, "Memory and time are planned for this card; training uses the machine that you are on."),
            (
                self.exact,
                "Runs the real training step without weights (some seconds): the exact peak instead of the formula's.",
            ),
            (
                self.lessons,
                "Shows under each control what it does, as its tooltip says it. Keys: Tab goes from one to the next; arrows, Page Up, Page Down, "
                "Home and End move a slider (in Notebook 7 without the arrows, which move between cells there).",
            ),
            (self.code, "Select all and copy: the settings as code, with this kit and without it."),
        ]:
            explain(widget, lesson)
        before = {
            "Model": [self.card, self.model_view],
            "LoRA": [self.share_view],
            "Data": [self.data],
            "Compare": [self.compare],
            "Code": [self.code],
        }
        self.sections = {}
        for name in SECTIONS:
            own = [self.controls[row.field].box for row in CONTROLS if row.section == name and row.field != "data"]
            after = [self.reasons_view] if name == "Memory" else []
            self.sections[name] = widgets.VBox(
                [*before.get(name, []), widgets.Box(own, layout=WRAPPED), *after], layout={"width": "auto"}
            )
        bar = widgets.Box([*self.preset_buttons.values(), self.undo, self.reset, self.lessons], layout=WRAPPED)
        plan = widgets.Box([self.plan_view, self.exact], layout=WRAPPED)
        return [
            widgets.HTML(views.STYLE, layout={"display": "none"}),
            bar,
            plan,
            self.bar_view,
            self.chooser,
            *self.sections.values(),
        ]

    def _wire(self) -> None:
        for name, button in self.preset_buttons.items():
            button.on_click(lambda _, name=name: self._applied(self.settings.edit(PRESETS[name].changes)))
        self.undo.on_click(lambda _: self._applied(self.settings.undo()))
        self.reset.on_click(lambda _: self._applied(self.settings.reset()))
        self.exact.on_click(lambda _: self._run_exactly())
        self.data.count.on_click(
            lambda _: self.data.count_tokens(str(self.config.data), self.preview.model, usable(self.config).max_length)
        )
        self.card.observe(lambda change: self._redraw(), "value")
        self.lessons.observe(lambda change: self._annotate(), "value")
        self.chooser.observe(lambda change: self._open_section(), "value")
        self._open_section()

    def _open_section(self) -> None:
        for name, section in self.sections.items():
            section.layout.display = None if name == self.chooser.value else "none"
        if self.preview is not None:
            self._redraw_slowly()

    # ------------------------------------------------------------------------------------------------ widget -> config

    def _edited(self, field: str, value: Any) -> None:
        self._applied(self.settings.edit({field: value}), self.controls[field])

    def _applied(self, reason: str | None, control: Control | None = None) -> None:
        """After a change: every panel on this config shows it; a change that was refused says why."""
        for panel in [panel for panel in _PANELS if panel.config is self.config and panel is not self]:
            panel.refresh()
        self.refresh()
        if reason and control is not None:
            control.say(reason=f"Not taken: {reason}", lessons=self.lessons.value)
        elif reason:
            self.plan_view.value = views.problem(f"Not taken: {reason}") + self.plan_view.value

    # ------------------------------------------------------------------------------------------------ config -> views

    def refresh(self) -> None:
        """Show the config as it is now. Call this after editing it in a cell of your own."""
        self.controls["micro_batch_size"].offer(_divisors(self.config.effective_batch_size))
        for field, control in self.controls.items():
            control.say(reason="")
            control.show(getattr(self.config, field))
        self.controls["num_train_epochs"].enable(not _positive(self.config.max_steps))
        self.undo.disabled = not self.settings.can_undo
        self.data.look(str(self.config.data))
        self._redraw()

    @property
    def gpu(self) -> Gpu:
        """The card that is planned for."""
        return self.cards[self.card.value]

    def _data_changed(self) -> None:
        if self.preview is not None:
            self._redraw()

    def _redraw(self) -> None:
        """What follows every move at once: the plan, its bar, and what stands next to the controls."""
        if self.preview is None or self._exact_for != self._state():
            self._show(preview_of(self.config, self.gpu, self.data.examples, reachable_hub(self.config, self.gpu)))
        else:
            self._show(self.preview)
        self._redraw_after_a_pause()

    def _show(self, preview: Preview) -> None:
        self.preview = preview
        self.plan_view.value = views.plan_line(preview, self.config.max_length)
        self.bar_view.value = views.memory_bar(preview)
        self.model_view.value = views.model_line(preview, light_of(self.config, preview))
        self.share_view.value = views.small(views.trainable_text(preview))
        self.reasons_view.value = views.reasons(preview)
        self._annotate()

    def _annotate(self) -> None:
        """The lines under the controls."""
        config, preview = usable(self.config), self.preview
        wrong = problems(self.config) or (by_field(preview.problem) if preview.problem else {})
        hints = views.hints(config, preview) | {"max_length": self.data.coverage(config.max_length)}
        for field, control in self.controls.items():
            control.say(hints.get(field, ""), wrong.get(field, control.reason), self.lessons.value)

    def _redraw_after_a_pause(self) -> None:
        """The slower views wait until nobody moves a slider any more. Outside a kernel there is nobody to wait for."""
        if self._pending is not None:
            self._pending.cancel()
        try:
            self._pending = asyncio.get_running_loop().call_later(PAUSE, self._redraw_slowly)
        except RuntimeError:
            self._redraw_slowly()

    def _redraw_slowly(self) -> None:
        state, config = self._state(), usable(self.config)
        if self._lights_for != state:
            self.controls["model"].offer(model_menu(config, self.gpu))
            self.controls["target_modules"].offer(views.layer_choices(self.preview.shape))
            self._lights_for = state
        if self.chooser.value == "Data":
            self.data.draw(config.max_length)
        if self.chooser.value == "Code":
            self.code.value = as_code(
                self.config, self.preview.plan, self.data.training_examples(config.validation_share)
            )

    def _state(self) -> Any:
        return repr(self.config), self.card.value

    # ------------------------------------------------------------------------------------------------ on request

    def _run_exactly(self) -> None:
        """Replace the formula's plan by the dry run's."""
        self.exact.disabled, self.exact.description = True, "working…"
        try:
            preview = preview_of(
                self.config, self.gpu, self.data.examples, reachable_hub(self.config, self.gpu), exact=True
            )
            self._exact_for = self._state()
            self._show(preview)
        except Exception as error:  # shown in place: an error in a callback is seen by nobody
            self.plan_view.value = views.problem(f"The dry run failed: {error}") + views.plan_line(
                self.preview, self.config.max_length
            )
        finally:
            self.exact.disabled, self.exact.description = False, "Exact"

    def summary(self) -> str:
        """The panel as text."""
        coverage = self.data.coverage(usable(self.config).max_length)
        return views.summary(self.config, self.preview, light_of(self.config, self.preview), coverage)

    __repr__ = summary
    _ipython_display_ = None  # ipywidgets 7 would show 110 characters of text where there is no front end

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        view = {"version_major": 2, "version_minor": 0, "model_id": self.model_id}
        return {"text/plain": self.summary(), "application/vnd.jupyter.widget-view+json": view}


def _html(**layout: str) -> widgets.HTML:
    return widgets.HTML(layout={"width": "auto"} | layout)


def _button(label: str, lesson: str, icon: str = "") -> widgets.Button:
    return widgets.Button(description=label, tooltip=lesson, icon=icon, layout={"width": "auto"})


def _divisors(number: Any) -> list[tuple[str, int]]:
    divisors = (
        [n for n in range(1, number + 1) if number % n == 0] if isinstance(number, int) and number < 10_000 else []
    )
    return [("the planner chooses", 0), *[(str(n), n) for n in divisors]]


def _positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and value > 0

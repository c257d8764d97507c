"""The control panel: every setting under your fingers, and what it means for your card while you move it.

    control_panel(config)               # edits `config` in place; the next cell trains

Data flows one way: widget -> config -> formula -> views. Back to the widgets it goes only by `refresh`: after undo, reset or a preset,
or when you have edited the config yourself. Nothing is trained in here. Core ipywidgets only, so it works with 7.7.1 (Colab) and 8;
where there is no notebook, the same is printed as text.
"""

from __future__ import annotations

import asyncio
from collections import deque
from functools import partial
from typing import Any

import ipywidgets as widgets

from helpers.config import TrainConfig
from helpers.hardware import KNOWN_GPUS, Gpu, detect_gpu
from helpers.panel import views
from helpers.panel.code import as_code
from helpers.panel.compare import CompareView
from helpers.panel.controls import CONTROLS, STYLE, WIDEST, Control, button, labeled
from helpers.panel.data import DataView
from helpers.panel.presets import PRESETS
from helpers.panel.preview import Preview, preview_of
from helpers.panel.settings import Settings, usable
from helpers.plots import has_notebook

SECTIONS = ("Model", "LoRA", "Training", "Memory", "Data", "Compare", "Code")
PAUSE = 0.3  # seconds without a move, after which the slower views follow: traffic lights of the whole menu, histogram, code
WRAPPED = {"flex_flow": "row wrap", "width": "auto"}
WIDE = {"width": "auto"}
_PANELS: deque[ControlPanel] = deque(maxlen=4)  # the newest; panels on one config follow each other


def control_panel(config: TrainConfig, gpu: Gpu | None = None) -> ControlPanel:
    """A widget that edits `config` in place and shows what each change means. Without a notebook, prints the same as text.

    Args:
        gpu: the card to plan for at first. Default: what this machine has.
    """
    panel = ControlPanel(config, gpu)
    if not has_notebook():
        print(panel.summary())
    return panel


class ControlPanel(widgets.VBox):
    """The panel. `refresh()` shows a config that was edited elsewhere; `preview` is what its views show."""

    def __init__(self, config: TrainConfig, gpu: Gpu | None = None) -> None:
        self.config, self.settings = config, Settings(config)
        machine = gpu or detect_gpu()
        self.cards = {str(machine) if gpu else f"this machine: {machine}": machine} | KNOWN_GPUS
        self.preview = preview_of(config, machine)
        self._exact_for = self._lights_for = ""  # the state that the dry run's plan, and the menu's lights, speak of
        self._pending: asyncio.TimerHandle | None = None

        self.controls: dict[str, Any] = {row.field: row.kind(row, self._edited) for row in CONTROLS}
        self.plan_view = widgets.HTML(layout=WIDE | {"flex": "1 1 320px", "min_width": "0"})
        self.bar_view, self.model_view = widgets.HTML(layout=WIDE), widgets.HTML(layout=WIDE)
        self.share_view, self.reasons_view = widgets.HTML(layout=WIDE), widgets.HTML(layout=WIDE)
        lesson = "Memory and time are planned for this card; training uses the machine that you are on."
        card = {"options": list(self.cards), "style": STYLE, "layout": {"max_width": WIDEST}}
        self.card = labeled(widgets.Dropdown, "plan for", lesson, **card)
        self.card.add_class("ftk-control")
        lesson = "Select all and copy: the settings as code, with this kit and without it."
        self.code = labeled(widgets.Textarea, "", lesson, rows=16)
        self.data = DataView(self.controls["data"], lambda path: self._edited("data", path), self._redraw)
        self.compare = CompareView()
        super().__init__([*self._top(), self._chooser(), *self.sections.values()])
        self.add_class("ftk-panel")
        _PANELS.append(self)
        self.refresh()

    # ------------------------------------------------------------------------------------------------ assembling

    def _top(self) -> list[widgets.Widget]:
        """What is always in sight: presets and undo, the plan, its memory bar."""
        self.preset_buttons = {
            name: button(name, preset.lesson, partial(self._change, preset.changes)) for name, preset in PRESETS.items()
        }
        lesson = "Takes back the last move, as often as you like."
        self.undo = button("Undo", lesson, lambda: self._applied(self.settings.undo()), "undo")
        lesson = "Everything as it was when this panel was made. Undo brings it back."
        self.reset = button("Reset", lesson, lambda: self._applied(self.settings.reset()), "refresh")
        lesson = (
            "Shows under each control what it does, as its tooltip says it. Keys: Tab goes from one to the next; arrows, "
            "Page Up, Page Down, Home and End move a slider (Notebook 7 takes the arrows to move between cells)."
        )
        self.lessons = labeled(widgets.ToggleButton, "Explain", lesson, icon="question")
        self.lessons.observe(lambda _: self._annotate(), "value")
        lesson = "Runs the real training step without weights (some seconds): the exact peak instead of the formula's."
        self.exact = button("Exact", lesson, self._run_exactly, "check")
        return [
            widgets.HTML(views.STYLE, layout={"display": "none"}),
            widgets.Box([*self.preset_buttons.values(), self.undo, self.reset, self.lessons], layout=WRAPPED),
            widgets.Box([self.plan_view, self.exact], layout=WRAPPED),
            self.bar_view,
        ]

    def _chooser(self) -> widgets.Widget:
        """The buttons that open one of the sections."""
        own = {"Model": [self.card, self.model_view], "LoRA": [self.share_view], "Data": [self.data]}
        own |= {"Compare": [self.compare], "Code": [self.code]}
        self.sections = {}
        for name in SECTIONS:
            controls = [control.box for control in self.controls.values() if control.row.section == name]
            if name != "Data":  # whose view has the one control itself
                own.setdefault(name, []).append(widgets.Box(controls, layout=WRAPPED))
            self.sections[name] = widgets.VBox(own[name], layout=WIDE)
        self.sections["Memory"].children += (self.reasons_view,)
        self.card.observe(lambda _: self._redraw(), "value")
        self.data.count.on_click(
            lambda _: self.data.count_tokens(str(self.config.data), self.preview.model, usable(self.config).max_length)
        )
        self.chooser = widgets.ToggleButtons(options=SECTIONS, value="Model", style={"button_width": "auto"})
        self.chooser.add_class("ftk-sections")
        self.chooser.observe(lambda _: self._open_section(), "value")
        self._open_section()
        return self.chooser

    def _open_section(self) -> None:
        for name, section in self.sections.items():
            section.layout.display = None if name == self.chooser.value else "none"
        self._redraw_slowly()

    # ------------------------------------------------------------------------------------------------ widget -> config

    def _edited(self, field: str, value: Any) -> None:
        self._change({field: value}, self.controls[field])

    def _change(self, changes: dict[str, Any], control: Control | None = None) -> None:
        self._applied(self.settings.edit(changes), control)

    def _applied(self, reason: str, control: Control | None = None) -> None:
        """After a change: every panel on this config shows it; a change that was refused says why."""
        for panel in {*_PANELS, self}:
            if panel.config is self.config:
                panel.refresh()
        if reason and control is not None:
            control.say(control.hint, f"Not taken: {reason}", self.lessons.value)
        elif reason:
            self.plan_view.value = views.div("problem", f"Not taken: {reason}") + self.plan_view.value

    # ------------------------------------------------------------------------------------------------ config -> views

    @property
    def gpu(self) -> Gpu:
        """The card that is planned for."""
        return self.cards[self.card.value]

    def refresh(self) -> None:
        """Show the config as it is now. Call this after editing it in a cell of your own."""
        batch = usable(self.config).effective_batch_size
        divisors = [(str(n), n) for n in range(1, batch + 1) if batch % n == 0]
        self.controls["micro_batch_size"].offer([("the planner chooses", 0), *divisors])
        wrong = self.config.problems()
        for field, control in self.controls.items():
            if field not in wrong:  # what no widget can show is said below it
                control.show(getattr(self.config, field))
        self.controls["num_train_epochs"].inputs[0].disabled = usable(self.config).max_steps > 0
        self.undo.disabled = not self.settings.moves
        self.data.look(str(self.config.data))
        self._redraw()

    def _redraw(self) -> None:
        """What follows every move at once: the plan, its bar, and what stands next to the controls."""
        if self._exact_for != self._state():
            self.preview = preview_of(self.config, self.gpu, self.data.training_examples())
        self._show(self.preview)
        if self._pending is not None:
            self._pending.cancel()
        try:  # the slower views wait until nobody moves a slider any more
            self._pending = asyncio.get_running_loop().call_later(PAUSE, self._redraw_slowly)
        except RuntimeError:  # outside a kernel there is nobody to wait for
            self._redraw_slowly()

    def _show(self, preview: Preview) -> None:
        self.preview = preview
        self.plan_view.value = views.plan_line(preview, self.config.max_length)
        self.bar_view.value = views.memory_bar(preview)
        self.model_view.value = views.model_line(preview)
        self.share_view.value = views.div("small", views.trainable_text(preview))
        self.reasons_view.value = views.reasons(preview)
        self._annotate()

    def _annotate(self) -> None:
        """The lines under the controls."""
        config = usable(self.config)
        wrong = views.faults(self.config, self.preview)
        hints = views.hints(config, self.preview) | {"max_length": self.data.coverage(config.max_length)}
        for field, control in self.controls.items():
            control.say(hints.get(field, ""), wrong.get(field, ""), self.lessons.value)

    def _redraw_slowly(self) -> None:
        state, config = self._state(), usable(self.config)
        if self._lights_for != state:
            self.controls["model"].offer(views.model_menu(config, self.gpu))
            self.controls["target_modules"].offer(views.layer_choices(self.preview.shape))
            self._lights_for = state
        if self.chooser.value == "Data":
            self.data.draw(config.max_length)
        if self.chooser.value == "Code":
            examples = self.data.training_examples(config.validation_share)
            self.code.value = as_code(self.config, self.preview.plan, examples)

    def _state(self) -> str:
        return f"{self.config!r} {self.card.value}"

    # ------------------------------------------------------------------------------------------------ on request

    def _run_exactly(self) -> None:
        """Replace the formula's plan by the dry run's."""
        self.exact.disabled, self.exact.description = True, "working…"
        try:
            preview = preview_of(self.config, self.gpu, self.data.training_examples(), exact=True)
            self._exact_for = self._state()
            self._show(preview)
        except Exception as error:  # shown in place: an error in a callback is seen by nobody
            self._show(self.preview)
            self.plan_view.value = views.div("problem", f"The dry run failed: {error}") + self.plan_view.value
        finally:
            self.exact.disabled, self.exact.description = False, "Exact"

    def summary(self) -> str:
        """The panel as text."""
        coverage = self.data.coverage(usable(self.config).max_length)
        return views.summary(self.config, self.preview, coverage)

    __repr__ = summary
    _ipython_display_ = None  # ipywidgets 7 would show 110 characters of text where there is no front end

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        view = {"version_major": 2, "version_minor": 0, "model_id": self.model_id}
        return {"text/plain": self.summary(), "application/vnd.jupyter.widget-view+json": view}

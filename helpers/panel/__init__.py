"""The control panel: `control_panel(config)` shows every setting, edits `config` in place, and says what each move costs.

settings  what may be set, and which combinations cannot work      preview   what these settings mean for the card, by formula
controls  one widget per setting                                   views     plan line, memory bar, help: HTML from an preview
lights    the model menu with its traffic lights                   data      pick or upload a file, its report and lengths
compare   recorded runs over each other                            presets   four starting points
panel     puts them together
"""

from helpers.panel.panel import ControlPanel, control_panel

__all__ = ["ControlPanel", "control_panel"]

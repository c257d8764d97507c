"""The control panel: `control_panel(config)` shows every setting, edits `config` in place, and says what each move costs.

settings  edits that are refused when they cannot work, undo      preview   what these settings mean for the card, by formula
controls  one widget per setting                                  views     plan line, memory bar, menus: HTML from a preview
presets   four starting points                                    data      pick or upload a file, its report and lengths
code      the settings as code for TRL and PEFT                   compare   recorded runs over each other
panel     puts them together                                      panel.css its looks
"""

from helpers.panel.panel import ControlPanel, control_panel

__all__ = ["ControlPanel", "control_panel"]

"""Traffic lights: which model of the menu fits the chosen card with the present settings."""

from __future__ import annotations

from helpers.catalog import CATALOG, BaseModel
from helpers.config import ConfigError, TrainConfig
from helpers.hardware import Gpu
from helpers.menu import traffic_light
from helpers.panel.outlook import Outlook
from helpers.panel.views import menu_label


def light_of(config: TrainConfig, outlook: Outlook) -> str:
    """ "fits", "tight", "no", or "unknown" where the formula does not know the model."""
    if outlook.plan is None:
        return "no"
    return light(config, outlook.gpu, BaseModel(outlook.model, outlook.shape)) if outlook.shape else "unknown"


def light(config: TrainConfig, gpu: Gpu, row: BaseModel) -> str:
    try:
        return traffic_light(config, gpu, row)[0]
    except (ConfigError, ValueError, TypeError):  # a setting that cannot work anywhere
        return "no"


def model_menu(config: TrainConfig, gpu: Gpu) -> list[tuple[str, str]]:
    """(label with its light, name) of every model, for the panel's menu."""
    rows = [(menu_label(name, light(config, gpu, row)), name) for name, row in CATALOG.items()]
    return [("auto: the best model that fits this card", "auto"), *rows]

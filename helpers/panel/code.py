"""The settings of a config as code: the dataclass, and what the libraries are told, ready to be pasted elsewhere.

    print(as_code(config, plan, training_examples=488))

Printed are the dictionaries of `helpers.recipe`, which training uses too. It needs neither torch nor the card that it is for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from helpers.config import TrainConfig
from helpers.panel.settings import FIELDS
from helpers.plan import Plan
from helpers.recipe import lora_kwargs, quantization_kwargs, sft_kwargs

UNKNOWN_EXAMPLES = 1000  # assumed where the data was not checked: decides after how many steps the loss is measured


def as_code(config: TrainConfig, plan: Plan | None, training_examples: int | None) -> str:
    """Both, one below the other; where there is no plan, only the dataclass. `training_examples`: None if not known."""
    changed = {name: getattr(config, name) for name in FIELDS if getattr(config, name) != FIELDS[name].default}
    dataclass = f"from helpers.config import TrainConfig\n\nconfig = {_call('TrainConfig', changed)}\n"
    if plan is None:
        return f"{dataclass}\n# No plan, so no plain code: these settings do not fit the card, or cannot work.\n"
    examples = training_examples or UNKNOWN_EXAMPLES
    sft = sft_kwargs(config, plan, (Path("runs") / config.name).as_posix(), examples)
    return f"""{dataclass}
# The same for TRL and PEFT alone, for {plan.gpu.name!r} and {examples:,} examples to train on.
# A whole script around it, which needs nothing of this kit: helpers.export.export_script

from peft import LoraConfig
from transformers import BitsAndBytesConfig
from trl import SFTConfig

quantization_config = {_call("BitsAndBytesConfig", quantization_kwargs(config, plan))}
peft_config = {_call("LoraConfig", lora_kwargs(config))}
args = {_call("SFTConfig", sft)}
"""


def _call(name: str, arguments: dict[str, Any] | None) -> str:
    """A call as code, one argument a line; `None` where there is nothing to call."""
    if arguments is None:
        return "None"
    rows = "".join(f"    {argument}={value!r},\n" for argument, value in arguments.items())
    return f"{name}(\n{rows})" if rows else f"{name}()"

"""The settings of a config as code: the dataclass, and the same in plain TRL and PEFT, ready to be pasted elsewhere.

    print(as_code(config, plan, training_examples=488))

The plain code is not a second description of the recipe: `helpers.recipe` itself is run, with stand-ins for the libraries that write
down what they are called with. So it needs neither torch nor the card it is for, and cannot differ from what is trained.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

from helpers import recipe
from helpers.config import TrainConfig
from helpers.plan import Plan

UNKNOWN_EXAMPLES = 1000  # assumed where the data was not checked: decides after how many steps the loss is measured
LIBRARIES = ("torch", "transformers", "peft", "trl")


class Written:
    """A piece of code. Called, it becomes the code of that call; its attributes are code too."""

    def __init__(self, name: str, arguments: dict[str, Any] | None = None) -> None:
        self.name, self.arguments = name, arguments

    def __call__(self, **arguments: Any) -> Written:
        return Written(self.name, arguments)

    def __repr__(self) -> str:
        if self.arguments is None:
            return self.name
        rows = "".join(f"    {name}={value!r},\n" for name, value in self.arguments.items())
        return f"{self.name}(\n{rows})"


class _Library(ModuleType):
    """Stands in for a library: whatever is taken from it is its own name, written down."""

    def __getattr__(self, name: str) -> Written:
        if name.startswith("__"):
            raise AttributeError(name)
        return Written(f"torch.{name}" if self.__name__ == "torch" else name)


@contextmanager
def _written_down() -> Iterator[None]:
    """While this lasts, the recipe writes code instead of making objects."""
    with patch.dict(sys.modules, {name: _Library(name) for name in LIBRARIES}):
        yield


def code_of(make: Callable[..., Any], *arguments: Any, **instead: str) -> str:
    """The code that would make what `make(*arguments)` makes, for a function of `helpers.recipe`.

    Args:
        instead: argument of the object that is made -> other code for it, in place of what the recipe gives or besides.
    """
    with _written_down():
        made = make(*arguments)
    if instead and made is not None:
        made = made(**made.arguments | {name: Written(code) for name, code in instead.items()})
    return repr(made)


def config_code(config: TrainConfig) -> str:
    """`TrainConfig(...)` with the fields that differ from their defaults."""
    changed = [
        f"    {field.name}={getattr(config, field.name)!r},\n"
        for field in fields(config)
        if getattr(config, field.name) != field.default
    ]
    arguments = "\n" + "".join(changed) if changed else ""
    return f"from helpers.config import TrainConfig\n\nconfig = TrainConfig({arguments})\n"


def plain_code(config: TrainConfig, plan: Plan, training_examples: int) -> str:
    """The same training with TRL, PEFT and transformers alone. `training_examples` decides how many steps an epoch has."""
    folder = Path("runs") / config.name
    also = ", EarlyStoppingCallback" if config.early_stopping_patience else ""
    device = {"": 0} if plan.gpu.kind == "cuda" else {"": plan.gpu.kind}
    return f"""import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig{also}
from trl import SFTConfig, SFTTrainer

quantization_config = {code_of(recipe.quantization_config, config, plan)}
peft_config = {code_of(recipe.lora_config, config)}
args = {code_of(recipe.sft_config, config, plan, folder.as_posix(), training_examples)}

# Give these as datasets with "prompt" and "completion" messages; helpers.data makes them from any file:
# training, validation = split(load_examples({config.data!r}), {config.validation_share!r}, seed={config.seed!r})
tokenizer = AutoTokenizer.from_pretrained({plan.model!r})
model = AutoModelForCausalLM.from_pretrained(
    {plan.model!r}, quantization_config=quantization_config, dtype=torch.{plan.dtype}, device_map={device!r}
)
trainer = SFTTrainer(
    model=model, args=args, peft_config=peft_config, processing_class=tokenizer,
    train_dataset=training, eval_dataset=validation.select(range(min({config.max_eval_samples}, len(validation)))),
)
for parameter in trainer.model.parameters():
    if parameter.requires_grad:
        parameter.data = parameter.data.float()  # TRL has cast the adapters to bf16: small updates would be lost
{_selective(plan)}{_early_stopping(config)}trainer.train()
trainer.save_model({folder.as_posix() + "/adapter"!r})
"""


def _selective(plan: Plan) -> str:
    """TRL's own setting for it does not reach a model inside PEFT on transformers 5.16 and newer."""
    if plan.checkpointing != "selective":
        return ""
    name = "enable_selective_activation_checkpointing"
    return f"from trl.models import {name}\n\n{name}(trainer.model.get_base_model())  # attention's output is kept\n"


def _early_stopping(config: TrainConfig) -> str:
    if not config.early_stopping_patience:
        return ""
    return f"trainer.add_callback(EarlyStoppingCallback(early_stopping_patience={config.early_stopping_patience}))\n"


def as_code(config: TrainConfig, plan: Plan | None, training_examples: int | None) -> str:
    """Both, one below the other; where there is no plan, only the first."""
    if plan is None:
        return config_code(config) + "\n# No plain code: these settings do not fit the card, or cannot work.\n"
    count = training_examples or UNKNOWN_EXAMPLES
    title = f"# The same with TRL and PEFT alone, for {plan.gpu.name} and {count:,} examples to train on:"
    return f"{config_code(config)}\n\n{title}\n\n{plain_code(config, plan, count)}"

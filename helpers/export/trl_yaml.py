"""The run as settings for TRL's own command line: `trl sft --config sft.yaml`, for cards that calculate in bf16.

Not for fp16 (a T4): the adapters of a quantized model are cast to bf16 by TRL, fp16's gradient scaler fails on them, and TRL's script has no
place to cast them back to fp32.
"""

from __future__ import annotations

import ast
from typing import Any

import yaml

from helpers import recipe
from helpers.code_view import code_of
from helpers.config import TrainConfig
from helpers.plan import Plan

HEAD = """# trl sft --config sft.yaml      (in this folder)
#
# Close to the run, not equal to it: TRL's script keeps the adapters in bf16 (train.py casts
# them to fp32), and its validation loss is the mean of the batches' means. On cards without
# bf16, such as a T4, it does not work at all: fp16's gradient scaler fails on bf16 adapters,
# and the script has no place to cast them.
"""
NOT_IN_YAML = ("output_dir", "tf32", "use_cpu")


def trl_yaml(config: TrainConfig, plan: Plan, training_examples: int) -> str:
    """The file itself; the data are the two files in `data`, which `datasets` finds by their names."""
    args = _arguments(config, plan, training_examples)
    targets = [config.target_modules] if isinstance(config.target_modules, str) else list(config.target_modules)
    model = {
        "model_name_or_path": plan.model,
        "dtype": plan.dtype,
        "use_peft": True,
        "lora_r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "lora_target_modules": targets,
    }
    if config.quantization == "nf4":
        model |= {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "use_bnb_nested_quant": True}
    data = {
        "dataset_name": "data",
        "dataset_train_split": "train",
        "dataset_test_split": "validation",
        "output_dir": "checkpoints",
    }
    return HEAD + yaml.safe_dump(model | data | args, sort_keys=False)


def _arguments(config: TrainConfig, plan: Plan, training_examples: int) -> dict[str, Any]:
    """What the recipe gives to SFTConfig, as plain values: TRL itself could refuse to make them on a machine without that card."""
    call = ast.parse(code_of(recipe.sft_config, config, plan, "", training_examples)).body[0].value
    values = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    return {name: value for name, value in values.items() if name not in NOT_IN_YAML and value is not None}

"""How `accelerate launch` shares the exported script's steps among several GPUs: one file per way.

    accelerate launch --config_file replicated.yaml train.py     # every GPU holds the whole model and takes part of the examples
    accelerate launch --config_file sharded.yaml train.py        # every GPU holds part of the model, too

Replicated is DDP: only the adapters' gradients travel, once per step. Sharded is FSDP2: every layer's packed weights travel twice per
micro-batch, so it is for models that do not fit one card. Both take a step's examples in equal parts.
"""

from __future__ import annotations

from typing import Any

import yaml

from helpers.plan import Plan

MIXED_PRECISION = {"float16": "fp16", "bfloat16": "bf16", "float32": "no"}
HEAD = """# accelerate launch --config_file {name} train.py
#
# {what}
#
# Another number of GPUs: change num_processes; a step's examples must be divisible by it.
# Several machines: the same file on each, with num_machines, num_processes (the GPUs of all of them),
# machine_rank (0, 1, ...), and main_process_ip and main_process_port of machine 0, whose firewall must
# let that port through. This folder must then be one that all machines see (a network drive): process 0
# alone writes the checkpoints, and after an interruption all must find them.
"""
REPLICATED = """DDP: each GPU holds the whole model and takes its share of every step's examples.
# For models that fit one card."""
SHARDED = """FSDP2: each GPU holds a part of every layer. For models that do not fit one card; slower, because
# the parts travel."""


def accelerate_configs(plan: Plan, gpus: int) -> dict[str, str]:
    """File name -> text, for `gpus` cards like the plan's in one machine."""
    common = {
        "compute_environment": "LOCAL_MACHINE",
        "num_machines": 1,
        "num_processes": gpus,
        "machine_rank": 0,
        "main_process_ip": None,
        "main_process_port": 29500,
        "mixed_precision": MIXED_PRECISION[plan.dtype],
        "use_cpu": False,  # the script itself says on what it calculates
    }
    sharded = common | {
        "distributed_type": "FSDP",
        "fsdp_config": {
            "fsdp_version": 2,
            "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",  # one part per transformer layer
            "fsdp_reshard_after_forward": True,
            "fsdp_cpu_ram_efficient_loading": False,  # not for 4-bit weights: every process loads them, in RAM
            "fsdp_state_dict_type": "FULL_STATE_DICT",  # without it, no adapter is saved at the end
        },
    }
    return {
        "replicated.yaml": _text("replicated.yaml", REPLICATED, common | {"distributed_type": "MULTI_GPU"}),
        "sharded.yaml": _text("sharded.yaml", SHARDED, sharded),
    }


def _text(name: str, what: str, settings: dict[str, Any]) -> str:
    return HEAD.format(name=name, what=what) + yaml.safe_dump(settings, sort_keys=False)

"""(config, plan) -> the configuration objects of the ecosystem.

What BitsAndBytesConfig, LoraConfig and SFTConfig are told is decided here and nowhere else, as plain dicts, so what is planned, what
is trained, what the panel shows as code and what is exported cannot differ.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.config import TrainConfig

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig
    from trl import SFTConfig

    from helpers.plan import Plan


def quantization_kwargs(config: TrainConfig, plan: Plan) -> dict[str, Any] | None:
    """4-bit NF4 with double quantization (arXiv 2305.14314), or None for 16-bit base weights."""
    if config.quantization == "none":
        return None
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",  # 16 levels placed where normally distributed weights are dense
        "bnb_4bit_use_double_quant": True,  # the scales are quantized too: 0.37 bit per weight saved
        "bnb_4bit_compute_dtype": plan.dtype,  # weights are unpacked to this for each multiplication
    }


def lora_kwargs(config: TrainConfig) -> dict[str, Any]:
    """The adapter: W stays frozen, (lora_alpha / r) x B x A is learned beside it (arXiv 2106.09685)."""
    return {
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "target_modules": config.target_modules,
        "task_type": "CAUSAL_LM",
    }


def sft_kwargs(
    config: TrainConfig, plan: Plan, output_dir: str | Path, training_examples: int, cut: str = "fixed"
) -> dict[str, Any]:
    """TRL's settings for this run.

    Args:
        training_examples: decides how many steps an epoch has.
        cut: "fixed" micro-batches, of which several are a step; or "tokens": `helpers.trainer` gets a whole step, and cuts it itself.
    """
    steps = total_steps(config, training_examples)
    steps_between_evaluations = -(-steps // config.num_evaluations)  # rounded up
    fixed = {
        "output_dir": str(output_dir),
        "max_length": plan.seq_len,
        # --- how much is learned, how fast
        "num_train_epochs": config.num_train_epochs,
        "max_steps": config.max_steps,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": config.lr_scheduler_type,
        "warmup_steps": round(config.warmup_ratio * steps),
        "seed": config.seed,
        # --- what fits in memory
        "per_device_train_batch_size": plan.micro_batch,
        "gradient_accumulation_steps": plan.accumulation,
        "gradient_checkpointing": plan.checkpointing != "off",  # selective or on: `helpers.compat.set_checkpointing`
        "activation_offloading": plan.offload,
        "per_device_eval_batch_size": plan.eval_batch,  # the default of 8 is a common cause of running out of memory
        "optim": plan.optimizer,
        # --- precision: TRL would otherwise choose bf16 everywhere, which a T4 can only emulate
        "fp16": plan.dtype == "float16",
        "bf16": plan.dtype == "bfloat16",
        "tf32": None,
        "use_cpu": plan.gpu.kind == "cpu",
        # --- what is measured and kept
        "eval_strategy": "steps",
        "eval_steps": steps_between_evaluations,
        "eval_on_start": True,  # the untrained model's loss, and a test that evaluation fits in memory
        "logging_steps": _steps_between_logs(steps, steps_between_evaluations),
        "logging_nan_inf_filter": False,  # a loss that is not a number must be seen
        "save_strategy": "steps",
        "save_steps": steps_between_evaluations,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
        "report_to": "none",
        "disable_tqdm": True,  # the live chart is the progress display
    }
    whole = {
        "per_device_train_batch_size": config.effective_batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": False,  # that is each piece's own
        "per_device_eval_batch_size": config.max_eval_samples,
    }
    return fixed | whole if cut == "tokens" else fixed


def quantization_config(config: TrainConfig, plan: Plan) -> BitsAndBytesConfig | None:
    """`quantization_kwargs` as transformers' object."""
    from transformers import BitsAndBytesConfig

    settings = quantization_kwargs(config, plan)
    return settings and BitsAndBytesConfig(**settings)


def lora_config(config: TrainConfig) -> LoraConfig:
    """`lora_kwargs` as PEFT's object."""
    from peft import LoraConfig

    return LoraConfig(**lora_kwargs(config))


def sft_config(
    config: TrainConfig, plan: Plan, output_dir: str | Path, training_examples: int, cut: str = "fixed"
) -> SFTConfig:
    """`sft_kwargs` as TRL's object."""
    from trl import SFTConfig

    return SFTConfig(**sft_kwargs(config, plan, output_dir, training_examples, cut))


def _steps_between_logs(steps: int, between_evaluations: int) -> int:
    """About twenty points on the curve, and one at each evaluation and checkpoint, so that a continued run finds its curve complete."""
    return max(n for n in range(1, max(1, steps // 20) + 1) if between_evaluations % n == 0)


def total_steps(config: TrainConfig, training_examples: int) -> int:
    """Optimizer steps of the whole run. The last step of an epoch may be smaller than the effective batch."""
    if config.max_steps > 0:
        return config.max_steps
    steps_per_epoch = -(-training_examples // config.effective_batch_size)
    return max(1, round(steps_per_epoch * config.num_train_epochs))

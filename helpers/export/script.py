"""A run as one plain Python file: transformers, PEFT and TRL, and nothing of this package.

    export_script(run, "export")     # export/train.py and its data; replicated.yaml and sharded.yaml for several GPUs; sft.yaml for bf16

The settings in it are not a second description of the recipe: `helpers.recipe` itself is run and written down. The data go along as
prompt/completion lines, because a script that parsed any learner's file would be a second copy of `helpers.data`.
"""

from __future__ import annotations

import json
from pathlib import Path

from datasets import Dataset

from helpers.config import TrainConfig
from helpers.export.accelerate_configs import accelerate_configs
from helpers.export.script_text import script_text
from helpers.export.trl_yaml import trl_yaml
from helpers.files import ExportError, atomic_folder
from helpers.hardware import AMPERE, Gpu
from helpers.plan import Plan
from helpers.runs import Run, fingerprint

SIGN = "train.py"
DATA = ("data/training.jsonl", "data/validation.jsonl")  # names by which `datasets` knows what is what


def export_script(
    run: Run,
    folder: str | Path | None = None,
    training: Dataset | None = None,
    validation: Dataset | None = None,
    gpus: int = 2,
) -> Path:
    """Write `train.py` with its two data files into `folder`, and return its path. Run it with `python train.py [model folder]`.

    It gives the losses of the run, step for step, on the same machine. For several GPUs, start it with `accelerate launch` and one
    of the two files beside it (`helpers.export.accelerate_configs`). On cards with bf16, `sft.yaml` for TRL's own command line is
    written too.

    Args:
        folder: where to. Default: `export` in the run folder.
        training, validation: the examples of the run, if they did not come from its data file.
        gpus: how many cards the two files for `accelerate launch` name.

    Raises:
        ExportError: the run is not finished, or the examples are not those that it was trained on.
    """
    if not run.finished:
        raise ExportError(
            f"{run.folder} is not finished, so there are no losses to reproduce: run its train cell again to go on."
        )
    config, plan = run.config, plan_of(run)
    training, validation = _examples(run, config, training, validation)
    return _write(Path(folder) if folder else run.folder / "export", config, plan, training, validation, gpus, run)


def export_plan(
    config: TrainConfig, plan: Plan, training: Dataset, validation: Dataset, folder: str | Path = "export"
) -> Path:
    """The same script for settings that were never run: for a model that fits only several cards, `make_plan(..., gpus=2, sharded=True)`.

    Returns:
        The path of `train.py`, to be started with `accelerate launch`.
    """
    return _write(Path(folder), config, plan, training, validation, max(2, plan.gpus), None)


def _write(
    folder: Path, config: TrainConfig, plan: Plan, training: Dataset, validation: Dataset, gpus: int, run: Run | None
) -> Path:
    with atomic_folder(folder, SIGN) as draft:
        (draft / DATA[0]).parent.mkdir()
        _write_lines(training, draft / DATA[0])
        _write_lines(validation.select(range(min(config.max_eval_samples, len(validation)))), draft / DATA[1])
        (draft / SIGN).write_text(script_text(config, plan, len(training), run), encoding="utf-8")
        for name, text in accelerate_configs(plan, gpus).items():
            (draft / name).write_text(text, encoding="utf-8")
        if plan.dtype == "bfloat16":
            (draft / "sft.yaml").write_text(trl_yaml(config, plan, len(training)), encoding="utf-8")
    if plan.dtype != "bfloat16":
        print(
            f"No sft.yaml: TRL's own script trains the adapters in bf16 and has no place to cast them back to fp32, and this run "
            f"calculates in {plan.dtype}."
        )
    return folder / SIGN


def plan_of(run: Run) -> Plan:
    """The plan that a run was trained with, as far as the recipe asks; runs of older versions recorded less."""
    was = run.plan
    kind = was.get("device") or ("cuda" if was["optimizer"] == "adamw_8bit" else "cpu")  # as the planner chooses
    before_ampere = was["dtype"] != "bfloat16"
    gpu = Gpu(
        was.get("card", kind), kind, 0, 0, capability=((7, 5) if before_ampere else AMPERE) if kind == "cuda" else None
    )
    return Plan(
        model=run.settings["model"],
        gpu=gpu,
        dtype=was["dtype"],
        optimizer=was["optimizer"],
        seq_len=was.get("seq_len", run.settings["max_length"]),
        micro_batch=was["micro_batch"],
        accumulation=was["accumulation"],
        checkpointing=was["checkpointing"],
        offload=was["offload"],
        eval_batch=was["eval_batch"],
        loss_head=was.get("loss_head", "torch"),
        loss_tile=was.get("loss_tile", 32768),
    )


def _examples(
    run: Run, config: TrainConfig, training: Dataset | None, validation: Dataset | None
) -> tuple[Dataset, Dataset]:
    from helpers.data import DataError, load_examples, split

    if training is None or validation is None:
        try:
            training, validation = split(
                load_examples(config.data, rejected=None), config.validation_share, config.seed
            )
        except DataError as error:
            raise ExportError(
                f"The data of {run.folder} cannot be read again ({error}): pass training= and validation=."
            ) from None
    if fingerprint(training, validation) != run.settings["data_sha256"]:
        raise ExportError(
            f"{config.data} does not hold the examples that {run.folder} was trained on (their SHA-256 differs), so its losses could "
            "not be reproduced: put the old file back, or pass training= and validation=."
        )
    return training, validation


def _write_lines(examples: Dataset, file: Path) -> None:
    with file.open("w", encoding="utf-8", newline="\n") as stream:
        stream.writelines(json.dumps(example, ensure_ascii=False) + "\n" for example in examples)

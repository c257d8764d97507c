"""The adapter with its tokenizer and a model card, to disk and back."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from helpers.charts import loss_chart
from helpers.export.card import model_card
from helpers.export.files import ExportError, whole_folder
from helpers.models import keep_weights_trainable, without_adapter
from helpers.runs import Run

WEIGHTS = "adapter_model.safetensors"


def save_adapter(run: Run, model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> Path:
    """Write adapter (safetensors), tokenizer, chat template, loss curve and model card to `run.adapter`, whole or not at all."""
    for adapter in model.peft_config.values():
        adapter.base_model_name_or_path = run.settings[
            "model"
        ]  # the model's name, not the cache folder of this machine
    with whole_folder(run.adapter) as draft:
        model.save_pretrained(draft, save_embedding_layers=False)  # the embeddings are frozen
        tokenizer.save_pretrained(draft)
        loss_chart(run.history, title=run.settings["name"]).savefig(draft / "loss.png")
        (draft / "README.md").write_text(model_card(run), encoding="utf-8")
    return run.adapter


def finished_adapter(source: Run | str | Path) -> Path:
    """The adapter folder of a finished run; a folder is taken as it is, so an unfinished run can be exported by naming its adapter.

    Raises:
        ExportError: the run is not finished.
        FileNotFoundError: there is no adapter in that folder.
    """
    if isinstance(source, Run):
        if not source.finished:
            raise ExportError(
                f"{source.folder} is not finished: run its train cell again to go on, or name the folder "
                f"{source.adapter} itself if what it has learned so far is enough."
            )
        source = source.adapter
    if not (Path(source) / WEIGHTS).is_file():
        raise FileNotFoundError(f"No adapter in {Path(source).resolve()}: train first, or check the folder's name.")
    return Path(source)


def load_adapter(folder: str | Path, base_model: PreTrainedModel | PeftModel) -> PeftModel:
    """`base_model` with the adapter in `folder`, read from disk. An adapter that it already carries is dropped.

    Raises:
        FileNotFoundError: there is no adapter in that folder.
        ExportError: the adapter belongs to another base model.
    """
    folder = finished_adapter(Path(folder))
    base = without_adapter(base_model)
    _check_layers(folder, base)
    model = PeftModel.from_pretrained(base, str(folder))
    keep_weights_trainable(model)
    return model


def _check_layers(folder: Path, base: PreTrainedModel) -> None:
    """Does every LoRA pair find a layer of its size? PEFT itself ignores pairs without a layer, and raises a page for the others."""
    sizes = {
        name: (module.out_features, module.in_features) for name, module in base.named_modules() if _is_linear(module)
    }
    with safe_open(folder / WEIGHTS, "pt") as tensors:
        shapes = {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    for name, shape in shapes.items():
        if ".lora_A." in name:
            layer = name.removeprefix("base_model.model.").split(".lora_A.")[0]
            wanted = (shapes[name.replace(".lora_A.", ".lora_B.")][0], shape[1])
            if sizes.get(layer) != wanted:
                raise wrong_base(folder, layer, wanted, sizes.get(layer))


def _is_linear(module: torch.nn.Module) -> bool:
    return hasattr(module, "in_features") and hasattr(module, "out_features")


def wrong_base(folder: Path, layer: str, wanted: tuple[int, int], found: tuple[int, ...] | None) -> ExportError:
    """The error for an adapter whose layers are not those of the base."""
    from peft import PeftConfig

    name = PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    there = f"is {found[0]} x {found[1]}" if found else "does not exist"
    return ExportError(
        f"The adapter in {folder} was trained on {name} and does not fit this base model, where {layer} {there} "
        f"instead of {wanted[0]} x {wanted[1]}: load the base it names."
    )

"""Base + adapter -> one 16-bit model, weight by weight.

    merged = merge(run)                          # runs/<name>/merged, a folder for from_pretrained, vLLM, to_gguf, ...

W becomes W + scale x B x A, calculated in fp32 and stored in 16 bit. One weight at a time is in memory, so a 7B model merges within
the RAM of a free notebook. Never into 4 bit: there, base and adapter would be rounded together once more. What each costs in
validation loss is measured by `python -m benchmarks.merging runs/<name>`: 2.23 merged into 16 bit, 2.27 as trained (4-bit base,
adapter beside it), 2.30 merged and then rounded to 4 bit, for the quickstart's adapter.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from safetensors import safe_open
from safetensors.torch import load_file

from helpers.disk import new_folder
from helpers.export.card import add_card
from helpers.files import ExportError
from helpers.hub import INDEX, WeightsError, indexed_files
from helpers.models import finished_adapter, wrong_base
from helpers.runs import WEIGHTS, Run
from helpers.weights import fetch_weights

SIGN = "merged_from.json"  # what a merged folder was made of; also marks it as ours
NOT_COPIED = ("*.safetensors", "*.py", "README.md", "adapter_config.json", "loss.png", "training_args.bin")
# Fields of PEFT's LoraConfig that are empty, False or "none" in plain LoRA.
UNLIKE_PLAIN_LORA = ["use_dora", "bias", "fan_in_fan_out", "lora_bias", "modules_to_save", "rank_pattern"]
UNLIKE_PLAIN_LORA += ["alpha_pattern", "trainable_token_indices", "target_parameters", "layer_replication"]
TIMES_BF16 = {"F32": 2, "F64": 4}  # safetensors' names for what becomes bf16 -> how many times as many bytes it has

Pairs = dict[str, tuple[torch.Tensor, torch.Tensor]]  # name of a weight of the base -> its A and B
Layout = dict[str, dict[str, Any]]  # name of a weight -> type, shape and place in its file


def merge(source: Run | str | Path, target: str | Path | None = None, base: str | Path | None = None) -> Path:
    """Write base + adapter as a 16-bit model folder: the base's files and config, the adapter's tokenizer and chat template.

    Args:
        source: a finished run, or an adapter folder.
        target: the folder to write. Default: `merged`, beside the adapter.
        base: folder or name of the 16-bit base model. Default: the one that the adapter names.

    Raises:
        ExportError: the run is not finished, the base is missing, 4-bit or another one, the adapter is not plain LoRA, the disk is full.
    """
    adapter = finished_adapter(source)
    target = Path(target) if target else adapter.parent / "merged"
    config = _plain_lora(adapter)
    name = str(base or config.base_model_name_or_path)
    try:
        base_folder = fetch_weights(name)
    except WeightsError as error:
        reasons = " ".join(str(error).split())
        raise ExportError(f"The base model {name} of the adapter in {adapter} cannot be had: {reasons}") from None
    refuse_quantized(base_folder)
    pairs, layouts = _pairs(adapter), {file: _layout(file) for file in _weight_files(base_folder)}
    weights = {name: weight for layout in layouts.values() for name, weight in layout.items()}
    for layer, (a, b) in pairs.items():
        wanted, found = [b.shape[0], a.shape[1]], weights.get(layer, {}).get("shape")
        if found != wanted:
            raise wrong_base(adapter, layer.removesuffix(".weight"), tuple(wanted), found)
    size = sum(end - start for start, end in (weight["data_offsets"] for weight in weights.values()))
    scale = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
    with new_folder(target, SIGN, size) as draft:
        _copy_small_files(base_folder, adapter, draft)
        for file, layout in layouts.items():
            _merge_file(file, draft / file.name, layout, pairs, scale)
        made_of = {"base": name, "adapter": adapter.resolve().name, "scale": scale, "layers": len(pairs)}
        (draft / SIGN).write_text(json.dumps(made_of, indent=2), encoding="utf-8")
        add_card(draft, adapter.parent)
    return target


def refuse_quantized(folder: Path) -> None:
    """Raise `ExportError` if `folder` holds 4-bit weights: what is made from them would be rounded twice."""
    if json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config"):
        raise ExportError(f"{folder} holds quantized weights: name the folder or the Hub id of the 16-bit version.")


def _plain_lora(adapter: Path) -> LoraConfig:
    config = PeftConfig.from_pretrained(str(adapter))
    odd = [name for name in UNLIKE_PLAIN_LORA if (getattr(config, name, None) or "none") != "none"]
    if not isinstance(config, LoraConfig) or odd:
        what = f"The adapter in {adapter} is no plain LoRA ({', '.join(odd) or config.peft_type})"
        raise ExportError(f"{what}: load the base in 16 bit with PEFT and use merge_and_unload() instead.")
    return config


def _weight_files(folder: Path) -> list[Path]:
    """The files that the index names, or the only one: some repositories hold a second copy under another name."""
    if (folder / INDEX).is_file():
        return [folder / name for name in indexed_files(folder)]
    return [folder / "model.safetensors"]


def _pairs(adapter: Path) -> Pairs:
    """PEFT's names begin with `base_model.model.`; all pairs together take a few MB."""
    learned = load_file(adapter / WEIGHTS)
    return {
        name.removeprefix("base_model.model.").replace(".lora_A.", "."): (a, learned[name.replace("lora_A", "lora_B")])
        for name, a in learned.items()
        if ".lora_A." in name
    }


def _layout(file: Path) -> Layout:
    """The header that the merged `file` will have, from its own: the same weights in the same order, in 16 bit."""
    with file.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    header.pop("__metadata__", None)
    layout, end = {}, 0
    for name, weight in header.items():
        begin, stop = weight["data_offsets"]
        start, end = end, end + (stop - begin) // TIMES_BF16.get(weight["dtype"], 1)
        dtype = "BF16" if weight["dtype"] in TIMES_BF16 else weight["dtype"]
        layout[name] = weight | {"dtype": dtype, "data_offsets": [start, end]}
    return layout


def _copy_small_files(base: Path, adapter: Path, draft: Path) -> None:
    """Configuration from the base, tokenizer and chat template from the adapter, which were trained with."""
    for folder in (base, adapter):
        for file in folder.iterdir():
            if file.is_file() and not any(file.match(pattern) for pattern in NOT_COPIED):
                shutil.copyfile(file, draft / file.name)
    for file in draft.glob("*config.json"):
        config = json.loads(file.read_text(encoding="utf-8"))
        config.pop("auto_map", None)  # names code of the model's own, which llama.cpp's converter would run
        for key in {"torch_dtype", "dtype"} & set(config):
            config[key] = "float16" if config[key] == "float16" else "bfloat16"
        file.write_text(json.dumps(config, indent=2), encoding="utf-8")


def _merge_file(source: Path, target: Path, layout: Layout, pairs: Pairs, scale: float) -> None:
    """Write one file of the base again, with what was learned added.

    safetensors' own writer wants all weights of a file at once, which are several GB. Its format (huggingface.co/docs/safetensors)
    is 8 bytes for the length of the header, the header as JSON, and the numbers one after the other.
    """
    header = json.dumps({"__metadata__": {"format": "pt"}} | layout).encode()
    header += b" " * (-len(header) % 8)  # the numbers begin at a multiple of 8 bytes
    with target.open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        for name in layout:
            with safe_open(source, "pt") as base:  # closed each time, so that what was read does not stay in memory
                weight = base.get_tensor(name)
            stored = torch.bfloat16 if weight.dtype in (torch.float32, torch.float64) else weight.dtype
            if name in pairs:
                a, b = pairs[name]
                weight = torch.addmm(weight.float(), b.float(), a.float(), alpha=scale)
            stream.write(weight.to(stored).reshape(-1).view(torch.uint8).numpy())

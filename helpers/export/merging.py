"""Base + adapter -> one 16-bit model, tensor by tensor.

    merged = merge(run)                          # runs/<name>/merged, a folder for from_pretrained, vLLM, to_gguf, ...

W becomes W + scale x B x A, calculated in fp32 and stored in 16 bit. At any time, one shard of the result is in memory and nothing
else, so a 7B model merges within the RAM of a free notebook. Never into 4 bit: there, base and adapter would be rounded together
once more. For the quickstart's adapter, the validation loss is 2.23 merged into 16 bit, 2.27 as it was trained (4-bit base, adapter
beside it), and 2.30 merged and then rounded to 4 bit; `python -m benchmarks.merging runs/<name>` measures yours. The order of the
first two is not general: an adapter also learns to make up for the errors of the 4-bit base, and a merge takes those away.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from helpers.files import ExportError, atomic_folder, check_disk
from helpers.hub import WeightsError
from helpers.models import WEIGHTS, finished_adapter, wrong_base
from helpers.runs import Run
from helpers.weights import fetch_weights

SHARD_BYTES = 2 * 10**9
SIGN = "merged_from.json"  # what a merged folder was made of; also marks it as ours
INDEX = "model.safetensors.index.json"
NOT_COPIED = (
    "*.safetensors",
    "*.safetensors.index.json",
    "README.md",
    "adapter_config.json",
    "loss.png",
    "training_args.bin",
)
PLAIN_LORA = {"use_dora": False, "bias": "none", "fan_in_fan_out": False, "lora_bias": False}
EMPTY_IN_PLAIN_LORA = (
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
)


def merge(
    source: Run | str | Path,
    target: str | Path | None = None,
    base: str | Path | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write base + adapter as a 16-bit model folder: shards, index, config, tokenizer with its chat template.

    Args:
        source: a finished run, or an adapter folder.
        target: the folder to write. Default: `merged`, beside the adapter.
        base: folder or name of the 16-bit base model. Default: the one that the adapter names.
        shard_bytes: the most that one file holds (a single larger tensor gets a file of its own), and about the RAM that is needed.

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
        raise ExportError(
            f"The base model {name} of the adapter in {adapter} cannot be had, so there is nothing to merge into: "
            f"{' '.join(str(error).split())}"
        ) from None
    _refuse_4_bit(base_folder)
    pairs = _pairs(adapter, config)
    tensors = _tensors(base_folder)
    _check_fit(adapter, pairs, tensors)
    check_disk(target, sum(tensor.bytes for tensor in tensors.values()))
    with atomic_folder(target, SIGN) as draft:
        _copy_small_files(base_folder, adapter, draft)
        _write_shards(tensors, pairs, draft, shard_bytes)
        made_of = {"base": name, "adapter": config.base_model_name_or_path, "scale": next(iter(pairs.values())).scale}
        (draft / SIGN).write_text(json.dumps(made_of | {"layers": len(pairs)}, indent=2), encoding="utf-8")
    return target


@dataclass(frozen=True)
class Tensor:
    """A tensor of the base, still on disk."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    """In which it will be stored: its own type if that has 16 bits (or is no weight at all), else bf16."""

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Pair:
    """What LoRA learned for one layer: W + scale x B x A."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float

    def added_to(self, weight: torch.Tensor) -> torch.Tensor:
        merged = weight.float()
        return merged.addmm_(self.b.float(), self.a.float(), alpha=self.scale)


def _plain_lora(adapter: Path) -> LoraConfig:
    config = PeftConfig.from_pretrained(str(adapter))
    odd = [name for name, plain in PLAIN_LORA.items() if getattr(config, name, plain) != plain]
    odd += [name for name in EMPTY_IN_PLAIN_LORA if getattr(config, name, None)]
    if not isinstance(config, LoraConfig) or odd:
        raise ExportError(
            f"The adapter in {adapter} is no plain LoRA ({', '.join(odd) or config.peft_type}), so it cannot be merged tensor by "
            "tensor: load the base in 16 bit with PEFT and use merge_and_unload() instead."
        )
    return config


def _pairs(adapter: Path, config: LoraConfig) -> dict[str, Pair]:
    """Name of the base's weight -> its pair. PEFT's names begin with `base_model.model.`; all pairs together take a few MB."""
    learned = load_file(adapter / WEIGHTS)
    pairs = {}
    for name in [name for name in learned if name.endswith(".lora_A.weight")]:
        rank = learned[name].shape[0]
        scale = config.lora_alpha / (rank**0.5 if config.use_rslora else rank)
        weight = name.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
        pairs[weight] = Pair(learned[name], learned[name.replace(".lora_A.", ".lora_B.")], scale)
    return pairs


def _refuse_4_bit(folder: Path) -> None:
    if json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config"):
        raise ExportError(
            f"{folder} holds quantized weights, and an adapter merged into those would be rounded along with them: "
            "name the 16-bit version of the base model as base=."
        )


def _tensors(folder: Path) -> dict[str, Tensor]:
    found = {}
    for file in _weight_files(folder):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118
                part = weights.get_slice(name)
                shape = part.get_shape()
                dtype = (part[:0] if shape else weights.get_tensor(name)).dtype
                narrow = torch.bfloat16 if dtype.is_floating_point and dtype.itemsize > 2 else dtype
                found[name] = Tensor(file, tuple(shape), narrow)
    return found


def _weight_files(folder: Path) -> list[Path]:
    """The files that the index names, or the only one: some repositories hold a second copy under another name."""
    if (folder / INDEX).is_file():
        files = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        missing = [file for file in files if not (folder / file).is_file()]
        if missing:
            raise ExportError(f"{folder} is not complete, {missing[0]} is missing: fetch the base model again.")
        return [folder / file for file in files]
    return (
        [folder / "model.safetensors"]
        if (folder / "model.safetensors").is_file()
        else sorted(folder.glob("*.safetensors"))
    )


def _check_fit(adapter: Path, pairs: dict[str, Pair], tensors: dict[str, Tensor]) -> None:
    for name, pair in pairs.items():
        wanted = (pair.b.shape[0], pair.a.shape[1])
        found = tensors[name].shape if name in tensors else None
        if found != wanted:
            raise wrong_base(adapter, name.removesuffix(".weight"), wanted, found)


def _copy_small_files(base: Path, adapter: Path, draft: Path) -> None:
    """Configuration from the base, tokenizer and chat template from the adapter, which were trained with."""
    for folder in (base, adapter):
        for file in folder.iterdir():
            if file.is_file() and not any(file.match(pattern) for pattern in NOT_COPIED):
                shutil.copyfile(file, draft / file.name)
    config = json.loads((draft / "config.json").read_text(encoding="utf-8"))
    for key in {"torch_dtype", "dtype"} & set(config):
        config[key] = config[key] if config[key] in ("float16", "bfloat16") else "bfloat16"
    (draft / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def _write_shards(tensors: dict[str, Tensor], pairs: dict[str, Pair], draft: Path, shard_bytes: int) -> None:
    shards = _shards(tensors, shard_bytes)
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(
            {name: _merged(name, tensors[name], pairs.get(name)) for name in names},
            draft / file,
            metadata={"format": "pt"},
        )
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(tensor.bytes for tensor in tensors.values())}, "weight_map": weight_map}
        (draft / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")


def _shards(tensors: dict[str, Tensor], shard_bytes: int) -> list[list[str]]:
    """Names in order, in groups of at most `shard_bytes`."""
    groups: list[list[str]] = [[]]
    used = 0
    for name, tensor in tensors.items():
        if groups[-1] and used + tensor.bytes > shard_bytes:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += tensor.bytes
    return groups


def _merged(name: str, tensor: Tensor, pair: Pair | None) -> torch.Tensor:
    """Read one tensor; the file is closed again at once, so that what was read of it does not stay mapped into memory."""
    with safe_open(tensor.file, "pt") as weights:
        weight = weights.get_tensor(name)
    return (weight if pair is None else pair.added_to(weight)).to(tensor.dtype)

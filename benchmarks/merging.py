"""What merging costs, in answers and in memory.

python -m benchmarks.merging runs/quickstart     # the run's adapter, unmerged and merged, in 16 bit and in 4 bit
python -m benchmarks.merging --memory            # the RAM that merging 1 GB and 4 GB takes (needs 9 GB of disk for a while)
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, LlamaConfig

from helpers.compat import keep_weights_trainable
from helpers.data import load_examples, split
from helpers.evaluation import answer_losses, greedy_tokens, mean_loss
from helpers.export import merge
from helpers.export.merging import INDEX
from helpers.models import generate, load_adapter
from helpers.runs import Run
from helpers.weights import fetch_weights

NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
EXAMPLES = 12
LAYERS_PER_FILE = 5  # half a GB in each
LAYERS = {
    "q_proj": (1536, 1536),
    "k_proj": (256, 1536),
    "v_proj": (256, 1536),
    "o_proj": (1536, 1536),
    "gate_proj": (8960, 1536),
    "up_proj": (8960, 1536),
    "down_proj": (1536, 8960),
}


# --------------------------------------------------------------------------------------------------------- answers


def quality(run: Run, folder: Path, examples: int = EXAMPLES) -> pd.DataFrame:
    """Validation loss of the adapter in four states, and the share of greedy tokens equal to 16-bit base + adapter.

    All calculate in fp32, so that only the stored weights differ.
    """
    _, validation = split(
        load_examples(run.settings["data"], rejected=None), run.settings["validation_share"], run.settings["seed"]
    )
    validation = validation.select(range(min(examples, len(validation))))
    base, merged = fetch_weights(run.settings["model"]), merge(run, folder)
    tokenizer = AutoTokenizer.from_pretrained(merged)
    rows, asked, wanted = [], None, None
    for name, weights, adapter, quantization in [
        ("16-bit base + adapter", base, True, None),
        ("merged into 16 bit", merged, False, None),
        ("NF4 base + adapter (as trained)", base, True, NF4),
        ("merged, then quantized to NF4", merged, False, NF4),
    ]:
        model = AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float32, quantization_config=quantization)
        keep_weights_trainable(model)
        model = load_adapter(run.adapter, model) if adapter else model
        if asked is None:
            answers = generate(model, tokenizer, list(validation["prompt"]), max_new_tokens=80)
            asked = [
                {"prompt": prompt, "completion": [{"role": "assistant", "content": text}]}
                for prompt, text in zip(validation["prompt"], answers)
            ]
        tokens = greedy_tokens(model, tokenizer, Dataset.from_list(asked))
        wanted = wanted or tokens
        rows.append(
            {
                "model": name,
                "validation loss": mean_loss(answer_losses(model, tokenizer, validation)),
                "greedy tokens equal": agreement(tokens, wanted),
            }
        )
    return pd.DataFrame(rows)


def agreement(one: list[list[int]], other: list[list[int]]) -> float:
    """The share of positions at which both choose the same token."""
    pairs = [(a, b) for left, right in zip(one, other) for a, b in zip(left, right)]
    return sum(a == b for a, b in pairs) / len(pairs)


# ---------------------------------------------------------------------------------------------------------- memory

# Run in a process of its own. What was read of a mapped file counts in the resident set, but the system takes it back when it needs
# the room; `RssAnon` is what it cannot take back. Both are printed.
CHILD = """
import sys, threading, time
from pathlib import Path
from helpers.export.merging import merge
def now(name):
    return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
names, done = ("RssAnon", "VmRSS"), False
start = {name: now(name) for name in names}
peak = dict(start)
def watch():
    while not done:
        for name in names:
            peak[name] = max(peak[name], now(name))
        time.sleep(0.005)
watcher = threading.Thread(target=watch)
watcher.start()
merge(sys.argv[1], sys.argv[2])
done = True
watcher.join()
print(*[peak[name] - start[name] for name in names])
"""


def memory(folder: Path, layers: int) -> tuple[int, int, int]:
    """(bytes merged, RAM above the imports, the same with pages of mapped files) for a model of so many layers. Linux only."""
    adapter, target = make_large(folder / f"base-{layers}", layers), folder / f"merged-{layers}"
    command = [sys.executable, "-c", CHILD, str(adapter), str(target)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    own, with_files = map(int, done.stdout.splitlines()[-1].split())
    return sum(file.stat().st_size for file in target.glob("*.safetensors")), own, with_files


def make_large(folder: Path, layers: int) -> Path:
    """A checkpoint with the layers of a 1.5B model (94 MB each in bf16) and an adapter for it; returns the adapter's folder."""
    folder.mkdir(parents=True)
    LlamaConfig(
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=layers,
        num_attention_heads=12,
        num_key_value_heads=2,
    ).save_pretrained(folder)
    learned, weight_map = {}, {}
    block = {}
    for layer in range(layers):
        for name, (rows, columns) in LAYERS.items():
            module = f"model.layers.{layer}.{'self_attn' if name[0] in 'qkvo' else 'mlp'}.{name}"
            block[f"{module}.weight"] = torch.full((rows, columns), 0.01, dtype=torch.bfloat16)
            learned[f"base_model.model.{module}.lora_A.weight"] = torch.full((8, columns), 0.01)
            learned[f"base_model.model.{module}.lora_B.weight"] = torch.full((rows, 8), 0.01)
        if (layer + 1) % LAYERS_PER_FILE == 0 or layer + 1 == layers:
            file = f"model-{layer:05d}.safetensors"
            save_file(block, folder / file)
            weight_map |= dict.fromkeys(block, file)
            block = {}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")
    adapter = folder.with_name(f"{folder.name}-adapter")
    LoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM", base_model_name_or_path=str(folder)).save_pretrained(adapter)
    save_file(learned, adapter / "adapter_model.safetensors")
    return adapter


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        if sys.argv[1:] == ["--memory"]:
            for layers in (11, 42):
                size, own, with_files = memory(Path(scratch), layers)
                print(
                    f"{size / 1e9:.1f} GB in files of 0.5 GB: {own / 1e9:.2f} GB of RAM above the imports "
                    f"({with_files / 1e9:.2f} GB with pages of mapped files)"
                )
        elif len(sys.argv) == 2:
            print(
                quality(Run.load(sys.argv[1]), Path(scratch) / "merged").to_string(
                    index=False, float_format="{:.4f}".format
                )
            )
        else:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()

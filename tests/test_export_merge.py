"""Base + adapter as one 16-bit model: equal to PEFT's own merge, small in memory, whole or not there."""

import json
import os

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GemmaConfig, LlamaConfig, MistralConfig, Qwen2Config

from helpers import disk, files
from helpers.export import ExportError, merge
from helpers.export.merging import INDEX
from helpers.models import load_quantized
from helpers.train import train

SIZES = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "head_dim": 12, "vocab_size": 259, "max_position_embeddings": 128}
FAMILIES = {
    "llama": (LlamaConfig, {"tie_word_embeddings": True}),
    "llama, untied": (LlamaConfig, {"tie_word_embeddings": False}),
    "qwen2": (Qwen2Config, {"tie_word_embeddings": True}),
    "mistral": (MistralConfig, {"tie_word_embeddings": False}),
    "gemma": (GemmaConfig, {"tie_word_embeddings": True}),
}
IDS = torch.arange(5, 60)[None]


def make_pair(folder, family="llama", dtype=torch.bfloat16, **lora):
    """A random base and an adapter whose B is not zero; returns their folders."""
    torch.manual_seed(0)
    config, more = FAMILIES[family]
    base = AutoModelForCausalLM.from_config(config(**SIZES, **more), dtype=dtype)
    base.save_pretrained(folder / "base")
    settings = {"r": 4, "lora_alpha": 12, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | lora
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "base"), LoraConfig(**settings))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.peft_config["default"].base_model_name_or_path = str(folder / "base")
    model.save_pretrained(folder / "adapter")
    return folder / "base", folder / "adapter"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("use_rslora", [False, True])
def test_every_weight_is_what_pefts_own_merge_gives(family, use_rslora, tmp_path):
    base, adapter = make_pair(tmp_path, family, dtype=torch.float32, use_rslora=use_rslora)
    merged = AutoModelForCausalLM.from_pretrained(merge(adapter), dtype=torch.float32)
    expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).merge_and_unload()
    untouched = AutoModelForCausalLM.from_pretrained(base)
    theirs, changed = dict(expected.named_parameters()), 0
    for name, weight in merged.named_parameters():
        torch.testing.assert_close(weight, theirs[name].bfloat16().float(), rtol=2**-7, atol=1e-7)  # one step of bf16
        changed += not torch.equal(weight, dict(untouched.named_parameters())[name].bfloat16().float())
    assert changed == 14  # seven layers in each of two blocks


def test_16_bit_weights_keep_their_type_and_tied_embeddings_stay_tied(tmp_path):
    _, adapter = make_pair(tmp_path, dtype=torch.float16)
    folder = merge(adapter)
    stored = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16} and "lm_head.weight" not in stored
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.dtype == torch.float16


def in_parts(base):
    """The base in several files with an index."""
    model = AutoModelForCausalLM.from_pretrained(base)
    (base / "model.safetensors").unlink()
    model.save_pretrained(base, max_shard_size="30KB")


def test_a_base_of_many_files_gives_as_many_and_they_load_together(tmp_path):
    base, adapter = make_pair(tmp_path)
    whole = AutoModelForCausalLM.from_pretrained(merge(adapter, tmp_path / "whole"))
    in_parts(base)
    (base / "second_copy.safetensors").write_bytes(b"the index does not name it")
    folder = merge(adapter, tmp_path / "parts")
    parts = sorted(file.name for file in folder.glob("*.safetensors"))
    assert len(parts) > 2 and parts == sorted({*json.loads((base / INDEX).read_text())["weight_map"].values()})
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(model(IDS).logits, whole(IDS).logits)


def test_a_run_merges_beside_its_adapter_and_takes_its_tokenizer_along(job, tmp_path):
    run = train(**job, root=tmp_path)
    folder = merge(run)
    assert folder == run.folder / "merged"
    assert AutoTokenizer.from_pretrained(folder).chat_template == job["tokenizer"].chat_template
    assert not (folder / "adapter_config.json").exists()
    assert "library_name: transformers" in (folder / "README.md").read_text()
    assert merge(run) == folder  # an older one is replaced


# ----------------------------------------------------------------------------------------------------- wrong input


def test_a_missing_and_an_incomplete_base_are_refused(tmp_path):
    base, adapter = make_pair(tmp_path)
    moved = base.rename(tmp_path / "moved")
    with pytest.raises(ExportError, match=r"base model .*base of the adapter .* cannot be had"):
        merge(adapter)
    in_parts(moved)
    next(moved.glob("model-00002*")).unlink()
    with pytest.raises(ExportError, match="is not complete, model-00002"):
        merge(adapter, base=moved)


def test_a_full_disk_is_found_before_anything_is_written(tmp_path, monkeypatch):
    _, adapter = make_pair(tmp_path)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda place: type("Usage", (), {"free": disk.SPARE + 1000}))
    with pytest.raises(ExportError, match=r"needs 0\.00 GB and its disk has 0\.00 GB to give: delete old runs"):
        merge(adapter)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_an_adapter_of_another_base_is_refused(tmp_path):
    _, adapter = make_pair(tmp_path)
    wider = LlamaConfig(**(SIZES | {"intermediate_size": 128}))
    AutoModelForCausalLM.from_config(wider).save_pretrained(tmp_path / "other")
    misfit = "does not fit this base model, where .*down_proj is 48 x 128 instead of 48 x 96"
    with pytest.raises(ExportError, match=f"was trained on .*base and {misfit}"):
        merge(adapter, base=tmp_path / "other")


def test_4_bit_weights_are_no_base(tmp_path, job):
    _, adapter = make_pair(tmp_path)
    model, _ = load_quantized(job["config"], job["plan"])
    model.save_pretrained(tmp_path / "nf4")
    with pytest.raises(ExportError, match="holds quantized weights: name .* the 16-bit version"):  # noqa: RUF043
        merge(adapter, base=tmp_path / "nf4")


@pytest.mark.parametrize("odd", [{"use_dora": True}, {"rank_pattern": {"q_proj": 2}}, {"modules_to_save": ["lm_head"]}])
def test_what_is_no_plain_lora_is_named_with_the_way_out(odd, tmp_path):
    _, adapter = make_pair(tmp_path, "llama, untied", **odd)
    with pytest.raises(ExportError, match=rf"no plain LoRA \({next(iter(odd))}\).*merge_and_unload"):
        merge(adapter)


# ------------------------------------------------------------------------------------------------------ its memory


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="memory is read from /proc")
def test_memory_does_not_grow_with_the_model(tmp_path, say):
    from benchmarks.merging import memory

    peaks = []
    for layers in (5, 20):  # 0.5 and 1.9 GB; `python -m benchmarks.merging --memory` takes 1 and 4
        size, own, with_files = memory(tmp_path, layers)
        peaks.append(own)
        more = f"({with_files / 1e9:.2f} GB with pages of mapped files)"
        say(f"merging {size / 1e9:.1f} GB in files of 0.5 GB: {own / 1e9:.2f} GB of RAM above the imports {more}")
        assert own <= 0.25e9  # one weight has 28 MB in 16 bit, and is in memory a few times, in fp32 too
    assert abs(peaks[1] - peaks[0]) < 0.1e9


@pytest.mark.slow
def test_the_quickstarts_adapter_answers_the_same_after_merging(root, tmp_path, say):
    from benchmarks.merging import quality
    from helpers.runs import Run

    table = quality(Run.load(root / "runs/quickstart"), tmp_path / "merged", examples=4).set_index("model")
    for name, row in table.iterrows():
        equal = f"greedy tokens equal {row['greedy tokens equal']:.1%}"
        say(f"{name}: validation loss {row['validation loss']:.4f}, {equal}")
    assert table.loc["merged into 16 bit", "greedy tokens equal"] >= 0.98
    loss = table["validation loss"]
    assert loss["merged, then quantized to NF4"] > loss["merged into 16 bit"]

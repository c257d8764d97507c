"""4-bit loading, adapters and generation, on the tiny model and in real NF4."""

import subprocess
import sys
from dataclasses import replace

import bitsandbytes as bnb
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from helpers.config import TrainConfig
from helpers.hardware import GIB, Gpu
from helpers.models import attach_lora, generate, load_quantized, without_adapter
from helpers.planner import make_plan

CPU = Gpu("CPU", "cpu", 16 * GIB, 12 * GIB)


@pytest.fixture
def config(tiny_model):
    return TrainConfig(model=str(tiny_model), r=4, lora_alpha=8)


@pytest.fixture
def loaded(config):
    return load_quantized(config, make_plan(config, CPU))


def gradients(model, tokenizer):
    model.train()
    model.zero_grad()
    ids = tokenizer("The quick brown fox jumps over the lazy dog.", return_tensors="pt")["input_ids"]
    model(input_ids=ids, labels=ids).loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def test_the_base_weights_are_nf4_with_double_quantization(loaded):
    model, _ = loaded
    layers = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    assert len(layers) == 2 * 7
    for layer in layers:
        assert layer.weight.dtype == torch.uint8
        assert layer.weight.quant_state.quant_type == "nf4" and layer.weight.quant_state.nested


def test_gradients_are_the_same_before_and_after_an_evaluation_and_a_generation(loaded, config):
    """bitsandbytes may repack weights for inference, and then the backward pass is silently wrong (helpers/models.py)."""
    model, tokenizer = loaded
    model = attach_lora(model, config)
    before = gradients(model, tokenizer)
    model.eval()
    with torch.no_grad():
        model(input_ids=torch.arange(5, 40)[None])
    generate(model, tokenizer, [[{"role": "user", "content": "hello"}]], max_new_tokens=4)
    assert before.abs().max() > 0
    torch.testing.assert_close(gradients(model, tokenizer), before, rtol=1e-6, atol=1e-6)
    assert not any(m.support_avx512bf16_for_cpu for m in model.modules() if isinstance(m, bnb.nn.Linear4bit))


def test_a_fresh_adapter_changes_nothing_and_is_in_fp32(loaded, config):
    model, _ = loaded
    ids = torch.arange(5, 40)[None]
    with torch.no_grad():
        before = model(input_ids=ids).logits
        model = attach_lora(model, config)
        after = model(input_ids=ids).logits
    torch.testing.assert_close(after, before)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_attaching_twice_gives_one_fresh_adapter_with_the_same_start(loaded, config):
    model, _ = loaded
    first = attach_lora(model, config)
    start = {name: p.detach().clone() for name, p in first.named_parameters() if p.requires_grad}
    for p in first.parameters():
        if p.requires_grad:
            p.data += 1
    second = attach_lora(first, config)
    again = {name: p for name, p in second.named_parameters() if p.requires_grad}
    assert start.keys() == again.keys()
    assert all(torch.equal(start[name], again[name]) for name in start)
    assert list(second.peft_config) == ["default"]
    assert not isinstance(without_adapter(second), PeftModel)


def test_generation_does_not_depend_on_the_batch_and_leaves_the_mode(loaded):
    model, tokenizer = loaded
    prompts = [[{"role": "user", "content": text}] for text in ("a", "a much longer question than the others", "b c d")]
    together = generate(model.train(), tokenizer, prompts, max_new_tokens=8)
    assert model.training
    assert together == [generate(model.eval(), tokenizer, [prompt], max_new_tokens=8)[0] for prompt in prompts]
    assert not model.training


def test_16_bit_base_weights_on_request(tiny_model):
    config = TrainConfig(model=str(tiny_model), quantization="none")
    model, _ = load_quantized(config, make_plan(config, CPU))
    assert not any(isinstance(module, bnb.nn.Linear4bit) for module in model.modules())


def test_a_second_adapter_replaces_the_first_even_on_the_base_variable(job, recwarn):
    base, config = job["model"], job["config"]
    config.target_modules = "all-linear"
    attach_lora(base, config)
    config.target_modules = ["q_proj"]
    second = attach_lora(base, config)  # what happens when the train cell runs again with other settings
    names = [name for name, _ in second.named_parameters() if "lora_" in name]
    assert names and all(".q_proj." in name for name in names)
    assert not [said for said in recwarn if "peft_config" in str(said.message) or "second time" in str(said.message)]


def test_loading_again_releases_the_model_before_even_if_a_variable_names_it(job, capsys):
    old = job["model"]

    def bytes_of_old():
        return sum(tensor.untyped_storage().nbytes() for tensor in [*old.parameters(), *old.buffers()])

    assert bytes_of_old() > 0
    capsys.readouterr()
    model, _ = load_quantized(job["config"], job["plan"])
    assert "Released the model that was loaded before" in capsys.readouterr().out and bytes_of_old() == 0
    ids = torch.arange(5, 20)[None]
    assert torch.isfinite(model(input_ids=ids).logits).all()
    with pytest.raises(Exception):  # noqa: B017 - whatever torch says about empty weights, it is not a silent second copy
        old(input_ids=ids)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16], ids=["bytes", "bytes named bf16"])
def test_weights_that_come_in_4_bit_give_the_same_answers_in_the_planned_type(config, tiny_model, tmp_path, storage):
    """Quantized by somebody else, with bf16 written into their configuration.

    Some of them store the packed weights under the name of a 16-bit type, so that FSDP can cut them: these bytes are no numbers.
    """
    theirs = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_quant_storage=storage,
    )
    original, copy = tmp_path / "original", tmp_path / "copy"
    AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).save_pretrained(original)
    AutoModelForCausalLM.from_pretrained(
        original, quantization_config=theirs, dtype=torch.bfloat16, device_map="cpu"
    ).save_pretrained(copy)
    for folder in (original, copy):
        AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    config.model = str(copy)
    ready, _ = load_quantized(config, make_plan(config, CPU))
    layer = ready.get_submodule("model.layers.0.self_attn.q_proj")
    assert layer.weight.dtype == storage
    assert layer.compute_dtype == layer.weight.quant_state.dtype == torch.float32 and layer.weight.quant_state.nested
    assert ready.get_submodule("model.norm").weight.dtype == torch.float32
    ids = torch.arange(5, 40)[None]
    with torch.no_grad():
        from_ready = ready(input_ids=ids).logits.float()
        config.model = str(original)
        ours, _ = load_quantized(config, make_plan(config, CPU))
        torch.testing.assert_close(from_ready, ours(input_ids=ids).logits.float(), atol=1e-3, rtol=1e-3)


def test_a_4_bit_model_is_put_on_the_first_card_whole(config, monkeypatch):
    """Not `device_map="auto"`, which spreads it over all cards and cannot be trained."""

    class Stop(Exception):
        pass

    asked = {}

    def from_pretrained(folder, **settings):
        asked.update(settings)
        raise Stop

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    plan = replace(make_plan(config, CPU), gpu=Gpu("Tesla T4", "cuda", 15 * GIB, 15 * GIB, (7, 5)), dtype="float16")
    with pytest.raises(Stop):
        load_quantized(config, plan)
    assert asked["device_map"] == {"": 0} and asked["dtype"] == torch.float16
    assert asked["quantization_config"].bnb_4bit_compute_dtype == torch.float16


@pytest.mark.slow
def test_loading_the_kit_says_nothing(root):
    """Least of all in red: bitsandbytes does on CPUs with AVX512-BF16."""
    done = subprocess.run([sys.executable, "-c", "import helpers.models"], cwd=root, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

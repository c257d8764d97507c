import itertools
import time
from dataclasses import replace

import pytest

from helpers.config import ConfigError, TrainConfig
from helpers.dryrun import measure
from helpers.hardware import GIB, KNOWN_GPUS, Gpu
from helpers.menu import choose_model, fit_status, plan_table
from helpers.plan import step_of
from helpers.planner import DoesNotFit, make_plan
from helpers.registry import CATALOG

CPU = Gpu("CPU", "cpu", 16 * GIB, 12 * GIB)
T4, RTX_4060 = KNOWN_GPUS["T4"], KNOWN_GPUS["RTX 4060"]
LLAMA_8B = CATALOG["Llama-3.1-8B-Instruct"]


@pytest.mark.parametrize("card", ["T4", "RTX 3060", "RTX 4060", "RTX 4090"])
@pytest.mark.parametrize("model", ["Llama-3.2-1B-Instruct", "Llama-3.2-3B-Instruct", "Qwen2.5-7B-Instruct"])
@pytest.mark.parametrize("effective_batch", [1, 7, 8, 16])
def test_a_plan_fits_and_keeps_the_effective_batch(card, model, effective_batch):
    plan = make_plan(TrainConfig(effective_batch_size=effective_batch), KNOWN_GPUS[card], CATALOG[model], exact=False)
    assert plan.micro_batch * plan.accumulation == effective_batch
    assert plan.peak_bytes <= plan.budget < KNOWN_GPUS[card].free_bytes


@pytest.mark.parametrize("length", [512, 1024, 2048])
def test_a_bigger_card_is_never_planned_slower(length):
    order = ["off", "selective", "on"]
    config = TrainConfig(max_length=length, effective_batch_size=16)
    cards = ("RTX laptop 6GB", "RTX 4060", "RTX 4070", "RTX 4090")
    plans = [make_plan(config, KNOWN_GPUS[card], CATALOG["Llama-3.2-3B-Instruct"], exact=False) for card in cards]
    recomputing = [order.index(plan.checkpointing) for plan in plans]
    assert recomputing == sorted(recomputing, reverse=True)
    for smaller, larger in itertools.pairwise(plans):
        assert larger.checkpointing != smaller.checkpointing or larger.micro_batch >= smaller.micro_batch


@pytest.mark.slow
def test_the_dry_run_decides_and_every_choice_is_explained():
    plan = make_plan(TrainConfig(max_length=2048), T4, LLAMA_8B)
    assert plan.measured.reserved <= plan.budget and plan.checkpointing != "off"
    for word in (
        "fp16",
        "attention",
        "micro-batch",
        "checkpointing on",
        "off would need",
        "peak =",
        "GiB",
        "s per step",
        "evaluation",
    ):
        assert word in str(plan)


@pytest.mark.slow
@pytest.mark.parametrize("card", ["T4", "L4", "RTX 4060"])
@pytest.mark.parametrize("model", ["Llama-3.2-1B-Instruct", "Qwen2.5-1.5B-Instruct"])
def test_every_kind_of_card_gets_an_exact_plan(card, model):
    """Models whose queries share keys, by the attention kernels of each kind of card: what torch counts for them differs by version."""
    plan = make_plan(TrainConfig(), KNOWN_GPUS[card], CATALOG[model])
    assert 0 < plan.measured.reserved <= plan.budget and plan.measured.flops > 0


@pytest.mark.slow
@pytest.mark.parametrize(("card", "model"), [("T4", "Llama-2-13b-chat-hf"), ("RTX 4060", "Llama-3.1-8B-Instruct")])
def test_a_plan_takes_seconds_and_neither_evaluation_nor_generation_needs_more_than_training(card, model, say):
    config = TrainConfig(max_length=2048, effective_batch_size=16)
    started = time.perf_counter()
    plan = make_plan(config, KNOWN_GPUS[card], CATALOG[model])
    spent = time.perf_counter() - started
    say(f"{card}, {model}: planned in {spent:.1f} s")
    assert spent < 25 * 1.5  # cold: the worker may have to start
    for phase, batch in (("evaluate", plan.eval_batch), ("generate", plan.generation_batch)):
        assert measure(step_of(config, plan, CATALOG[model].shape, phase, batch)).allocated <= plan.measured.allocated
    assert make_plan(config, KNOWN_GPUS[card], CATALOG[model], exact=False).peak_bytes == pytest.approx(
        plan.peak_bytes, rel=0.15
    )


@pytest.mark.slow
def test_prompts_are_answered_in_large_batches_up_to_trainings_peak():
    """A T4 has 14 GiB, and eight prompts at a time would use two of them."""
    plan = make_plan(TrainConfig(), T4, CATALOG["Qwen2.5-1.5B-Instruct"])
    assert plan.generation_batch == 48
    little = make_plan(TrainConfig(max_length=2048), RTX_4060, LLAMA_8B)
    assert 1 <= little.generation_batch < 48
    for batch, fits in ((little.generation_batch, True), (little.generation_batch * 2, False)):
        step = step_of(TrainConfig(), little, LLAMA_8B.shape, "generate", batch)
        assert (measure(step).reserved <= little.measured.reserved) is fits


def test_host_memory_for_offloading_is_counted_twice():
    """Buffers that a card can reach are rounded up to powers of two."""
    from helpers.planner import _host_bytes

    plan = make_plan(TrainConfig(max_length=16384), KNOWN_GPUS["RTX laptop 6GB"], CATALOG["Qwen3-4B"], exact=False)
    shape = CATALOG["Qwen3-4B"].shape
    assert plan.offload
    kept = (
        plan.seq_len * plan.micro_batch * shape.hidden_size * 2 * shape.num_hidden_layers
    )  # two bytes, one input for each layer
    assert 2 * kept <= _host_bytes(TrainConfig(), plan, shape) < 2.1 * kept + 2 * plan.seq_len**2


def test_planning_by_formula_is_instant():
    make_plan(TrainConfig(), T4, LLAMA_8B, exact=False)
    started = time.perf_counter()
    for _ in range(10):
        make_plan(TrainConfig(max_length=2048, effective_batch_size=16), T4, LLAMA_8B, exact=False)
    assert (time.perf_counter() - started) / 10 < 0.05


def test_what_does_not_fit_says_by_how_much_and_three_things_that_would():
    with pytest.raises(DoesNotFit) as error:
        make_plan(TrainConfig(max_length=512, r=256), replace(RTX_4060, free_bytes=7 * GIB), LLAMA_8B)
    text = str(error.value)
    for part in ("MiB too little", "This would fit: model=", "GiB)"):
        assert part in text


def test_examples_get_shorter_only_when_nothing_else_helps():
    """On a 6 GB card: first checkpointing, then activations in host memory, and with little of that fewer tokens."""
    card, lengths = KNOWN_GPUS["RTX laptop 6GB"], (256, 1024, 4096, 16384, 32768)
    plans = [make_plan(TrainConfig(max_length=n), card, CATALOG["Qwen3-4B"], exact=False) for n in lengths]
    stages = [(plan.checkpointing != "off") + plan.offload for plan in plans]
    assert stages == sorted(stages) and stages[0] < stages[-1] == 2
    assert all(plan.seq_len == n or plan.offload for plan, n in zip(plans, lengths))
    little = make_plan(
        TrainConfig(max_length=32768), replace(card, ram_free_bytes=int(2.3 * GIB)), CATALOG["Qwen3-4B"], exact=False
    )
    assert 1024 < little.seq_len < plans[-1].seq_len and "do not fit" in str(little)


def test_the_plan_is_for_the_longest_example_if_that_is_shorter():
    assert make_plan(TrainConfig(max_length=2048), T4, LLAMA_8B, exact=False, longest_example=300).seq_len == 300


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 5000}, "r=5000 is larger than the layer k_proj"),
        ({"max_length": 200_000}, "longer than the 131072 tokens"),
        ({"target_modules": ["query"]}, "target_modules"),
        ({"effective_batch_size": 6, "micro_batch_size": 4}, "not divisible"),
    ],
)
def test_settings_that_cannot_work_get_one_sentence(settings, message):
    with pytest.raises(ConfigError, match=message) as error:
        make_plan(TrainConfig(**settings), T4, LLAMA_8B, exact=False)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("free", [0, -1])
def test_a_card_without_memory_is_refused(free):
    with pytest.raises(ConfigError, match="free memory"):
        make_plan(TrainConfig(), replace(T4, free_bytes=free), LLAMA_8B)


def test_a_model_that_does_not_continue_text_is_refused(tmp_path):
    from transformers import T5Config

    T5Config().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="not a causal language model"):
        make_plan(TrainConfig(), T4, str(tmp_path))


def test_too_little_ram_to_load_is_said_before_loading():
    with pytest.raises(DoesNotFit, match="RAM"):
        make_plan(TrainConfig(), replace(T4, ram_free_bytes=GIB), LLAMA_8B, exact=False)


def test_on_linux_expandable_segments_are_asked_for_before_torch_starts(root):
    import os
    import subprocess
    import sys

    code = "import helpers, os; print(os.environ.get('PYTORCH_ALLOC_CONF'))"
    clean = {name: value for name, value in os.environ.items() if name != "PYTORCH_ALLOC_CONF"}
    printed = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=clean, capture_output=True, text=True
    ).stdout.strip()
    assert printed == ("expandable_segments:True" if sys.platform == "linux" else "None")


def test_a_cpu_is_planned_in_fp32_with_small_micro_batches():
    plan = make_plan(TrainConfig(), CPU, CATALOG["SmolLM2-135M-Instruct"])
    assert (plan.dtype, plan.micro_batch, plan.optimizer) == ("float32", 2, "adamw_torch")


def test_auto_picks_the_embedded_model_without_gpu_or_hub_and_a_larger_one_otherwise():
    assert "135M" in choose_model(TrainConfig(), CPU, hub_reachable=True)[0]
    assert "135M" in choose_model(TrainConfig(), T4, hub_reachable=False)[0]
    for card in ("T4", "RTX 4060", "RTX 2060"):
        chosen = next(
            row for row in CATALOG.values() if row.id == choose_model(TrainConfig(), KNOWN_GPUS[card], True)[0]
        )
        assert not chosen.gated and 1e9 < chosen.shape.parameters() < 3.2e9


def test_one_line_of_config_chooses_another_model():
    assert choose_model(TrainConfig(model="Qwen3-8B"), T4, True)[0] == "Qwen/Qwen3-8B"
    assert choose_model(TrainConfig(model="/my/folder"), T4, True)[0] == "/my/folder"


def test_a_model_that_is_not_on_the_menu_is_planned_from_its_config_file(tiny_model):
    plan = make_plan(TrainConfig(), CPU, str(tiny_model))
    assert plan.memory is not None and plan.memory.total_bytes < GIB


def test_an_unknown_model_gets_the_safest_settings():
    plan = make_plan(TrainConfig(), T4, "nobody/knows-this")
    assert (plan.micro_batch, plan.checkpointing, plan.memory, plan.peak_bytes) == (1, "on", None, None)


def test_the_menu_has_a_light_for_every_model():
    rows = {row["model"]: row for row in plan_table(list(CATALOG), RTX_4060)}
    assert rows["Qwen2.5-1.5B-Instruct"]["fits"] == "fits" and rows["Qwen3-14B"]["fits"] == "no"
    assert {row["fits"] for row in rows.values()} <= {"fits", "tight", "no"}
    assert fit_status(TrainConfig(), T4, LLAMA_8B)[0] == "fits"


def test_two_cards_share_the_step_and_each_plan_is_per_card():
    config = TrainConfig(effective_batch_size=16)
    one, two = (make_plan(config, T4, LLAMA_8B, exact=False, gpus=gpus) for gpus in (1, 2))
    assert one.micro_batch * one.accumulation == 16 and two.micro_batch * two.accumulation * 2 == 16
    assert "x 2 GPUs = 16 examples" in str(two) and "on each GPU" in str(two) and "replicated (DDP)" in str(two)
    extra = {name: two.memory.parts.get(name, 0) for name in ("gradients on their way", "NCCL")}
    assert all(extra.values()) and not set(extra) & set(one.memory.parts)


def test_a_model_that_fits_no_single_card_fits_two_that_share_its_weights():
    config, model = TrainConfig(effective_batch_size=8), CATALOG["Llama-2-13b-chat-hf"]
    card = replace(KNOWN_GPUS["RTX 4060"], ram_free_bytes=64 * GIB)
    with pytest.raises(DoesNotFit, match="sharded=True"):
        make_plan(config, card, model, exact=False, gpus=2)
    plan = make_plan(config, card, model, gpus=2, sharded=True)
    whole = make_plan(config, replace(KNOWN_GPUS["RTX 4090"], ram_free_bytes=64 * GIB), model, exact=False)
    assert plan.peak_bytes <= plan.budget and plan.measured is None and "sharded (FSDP2)" in str(plan)
    codes = model.shape.linear_parameters() / 2  # two in a byte; each card keeps half of them, and all scales
    assert plan.memory.parts["base weights"] == pytest.approx(whole.memory.parts["base weights"] - codes / 2, rel=0.001)


@pytest.mark.parametrize(
    ("gpu", "batch", "words"), [(CPU, 8, "is for CUDA cards"), (T4, 7, "cannot be shared equally among 2")]
)
def test_sharing_that_cannot_work_is_refused_in_a_sentence(gpu, batch, words):
    with pytest.raises(ConfigError, match=words):
        make_plan(TrainConfig(effective_batch_size=batch), gpu, LLAMA_8B, exact=False, gpus=2)

import itertools
import json
import time
from dataclasses import replace

import pytest

from benchmarks.planned_seconds import LENGTHS
from helpers import menu
from helpers.config import ConfigError, TrainConfig
from helpers.cutting import cut
from helpers.dryrun import Step, measure
from helpers.hardware import GIB, KNOWN_GPUS, MIB, Gpu, speed
from helpers.memory import CUDA_CONTEXT
from helpers.menu import choose_model, fit_status
from helpers.modes import CHECKPOINTING, host_bytes
from helpers.plan import HEADROOM, estimate_of, step_of, suggest_alternatives, with_cut
from helpers.planner import DoesNotFit, make_plan
from helpers.registry import CATALOG

CPU = Gpu("CPU", "cpu", 16 * GIB, 12 * GIB)
T4, RTX_4060 = KNOWN_GPUS["T4"], KNOWN_GPUS["RTX 4060"]
SIXTEEN = {"max_length": 1024, "effective_batch_size": 16}
ALPACA = json.loads(LENGTHS.read_text())["lengths"]  # of 2,048 examples: half of them below 148 tokens, some of 1,024
LLAMA_8B, QWEN_4B = CATALOG["Llama-3.1-8B-Instruct"], CATALOG["Qwen3-4B"]


def by_formula(card=T4, model=LLAMA_8B, settings=None, **options):
    return make_plan(TrainConfig(**settings or {}), card, model, exact=False, **options)


@pytest.mark.parametrize("card", ["T4", "RTX 3060", "RTX 4060", "RTX 4090"])
@pytest.mark.parametrize("model", ["Llama-3.2-1B-Instruct", "Llama-3.2-3B-Instruct", "Qwen2.5-7B-Instruct"])
@pytest.mark.parametrize("effective_batch", [1, 7, 8, 16])
def test_a_plan_fits_and_keeps_the_effective_batch(card, model, effective_batch):
    plan = by_formula(KNOWN_GPUS[card], CATALOG[model], {"effective_batch_size": effective_batch})
    assert plan.micro_batch * plan.accumulation == effective_batch
    assert plan.peak_bytes <= plan.budget < KNOWN_GPUS[card].free_bytes


@pytest.mark.parametrize("length", [512, 1024, 2048])
def test_a_bigger_card_is_never_planned_slower(length):
    settings = {"max_length": length, "effective_batch_size": 16}
    cards = ("RTX laptop 6GB", "RTX 4060", "RTX 4070", "RTX 4090")
    plans = [by_formula(KNOWN_GPUS[card], CATALOG["Llama-3.2-3B-Instruct"], settings) for card in cards]
    recomputing = [CHECKPOINTING.index(plan.checkpointing) for plan in plans]
    assert recomputing == sorted(recomputing, reverse=True)
    for smaller, larger in itertools.pairwise(plans):
        assert larger.checkpointing != smaller.checkpointing or larger.micro_batch >= smaller.micro_batch


@pytest.mark.slow
def test_the_dry_run_decides_and_every_choice_is_explained():
    plan = make_plan(TrainConfig(max_length=2048), T4, LLAMA_8B)
    assert plan.measured.reserved <= plan.budget and plan.checkpointing != "off"
    words = ["fp16", "attention", "micro-batch", "checkpointing", "evaluation", "peak", "GiB"]
    assert all(
        word in " ".join(plan.reasons)
        for word in [*words, "checkpointing on", "off would need", "peak at most", "s per step"]
    )


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
        run = measure(step_of(config, plan, CATALOG[model].shape, phase, batch))
        assert run.reserved + CUDA_CONTEXT <= plan.peak_bytes
    guessed = make_plan(config, KNOWN_GPUS[card], CATALOG[model], exact=False)
    assert guessed.peak_bytes == pytest.approx(plan.peak_bytes, rel=0.15)


@pytest.mark.slow
def test_prompts_are_answered_in_large_batches_up_to_trainings_peak():
    """A T4 has 14 GiB, and eight prompts at a time would use two of them."""
    plan = make_plan(TrainConfig(), T4, CATALOG["Qwen2.5-1.5B-Instruct"])
    assert plan.generation_batch == 48
    little = make_plan(TrainConfig(max_length=2048), RTX_4060, LLAMA_8B)
    assert 1 <= little.generation_batch < 48
    for batch, fits in ((little.generation_batch, True), (little.generation_batch * 2, False)):
        step = step_of(TrainConfig(), little, LLAMA_8B.shape, "generate", batch)
        assert (measure(step).reserved + CUDA_CONTEXT <= little.peak_bytes) is fits


def test_host_memory_for_offloading_is_counted_twice():
    """Buffers that a card can reach are rounded up to powers of two."""
    plan, shape = by_formula(KNOWN_GPUS["RTX laptop 6GB"], QWEN_4B, {"max_length": 16384}), QWEN_4B.shape
    tokens = plan.seq_len * plan.micro_batch
    kept = 2 * tokens * shape.hidden_size * shape.num_hidden_layers  # two bytes, one input for each layer
    assert plan.offload and 2 * kept <= host_bytes(TrainConfig(), plan, shape) < 2.1 * kept + 2 * plan.seq_len**2


def test_planning_by_formula_is_instant():
    by_formula()
    started = time.perf_counter()
    for _ in range(10):
        by_formula(settings={"max_length": 2048, "effective_batch_size": 16})
    assert (time.perf_counter() - started) / 10 < 0.02


def test_what_does_not_fit_says_by_how_much_and_what_would():
    with pytest.raises(DoesNotFit) as error:
        by_formula(replace(RTX_4060, free_bytes=7 * GIB), settings={"r": 256})
    for part in ("5583 MiB too little", "This would fit: model='Phi-3.5-mini-instruct' (6.3 GiB)", "r=32"):
        assert part in str(error.value)
    after_all = suggest_alternatives(TrainConfig(max_length=2048), by_formula(settings={"max_length": 2048}))
    assert "and yet it ran out" in after_all and "max_length=" in after_all


def test_examples_get_shorter_only_when_nothing_else_helps():
    """On a 6 GB card: first checkpointing, then activations in host memory, and with little of that fewer tokens."""
    card, lengths = KNOWN_GPUS["RTX laptop 6GB"], (256, 1024, 4096, 16384, 32768)
    plans = [by_formula(card, QWEN_4B, {"max_length": n}) for n in lengths]
    stages = [(plan.checkpointing != "off") + plan.offload for plan in plans]
    assert stages == sorted(stages) and stages[0] < stages[-1] == 2
    assert all(plan.seq_len == n or plan.offload for plan, n in zip(plans, lengths))
    little = by_formula(replace(card, ram_free_bytes=int(2.3 * GIB)), QWEN_4B, {"max_length": 32768})
    assert 1024 < little.seq_len < plans[-1].seq_len and "do not fit" in str(little)


def test_the_plan_is_for_the_longest_example_if_that_is_shorter():
    assert [by_formula(lengths=[20, longest]).seq_len for longest in (300, 600)] == [300, 512]


@pytest.mark.parametrize(
    ("card", "settings", "gpus", "message"),
    [
        (T4, {"r": 5000}, 1, "r=5000 is larger than the layer k_proj"),
        (T4, {"max_length": 200_000}, 1, "longer than the 131072 tokens"),
        (T4, {"target_modules": ["query"]}, 1, "target_modules"),
        (T4, {"effective_batch_size": 6, "micro_batch_size": 4}, 1, "not divisible"),
        (replace(T4, free_bytes=0), {}, 1, "free memory"),
        (replace(T4, free_bytes=-1), {}, 1, "free memory"),
        (replace(T4, ram_free_bytes=GIB), {}, 1, "GiB of RAM, and 1.0 GiB are free"),
        (CPU, {"effective_batch_size": 8}, 2, "is for CUDA cards"),
        (T4, {"effective_batch_size": 7}, 2, "cannot be shared equally among 2"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(card, settings, gpus, message):
    with pytest.raises((ConfigError, DoesNotFit), match=message) as error:
        by_formula(card, settings=settings, gpus=gpus)
    assert "\n" not in str(error.value)
    assert isinstance(error.value, DoesNotFit) == ("RAM" in message)


def test_a_model_that_does_not_continue_text_is_refused(tmp_path):
    from transformers import T5Config

    T5Config().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="not a causal language model"):
        make_plan(TrainConfig(), T4, str(tmp_path))


def test_a_cpu_is_planned_in_fp32_with_small_micro_batches():
    plan = make_plan(TrainConfig(), CPU, CATALOG["SmolLM2-135M-Instruct"])
    assert (plan.dtype, plan.micro_batch, plan.optimizer) == ("float32", 2, "adamw_torch")


def test_auto_picks_the_embedded_model_without_gpu_or_hub_and_a_larger_one_otherwise():
    assert "135M" in choose_model(TrainConfig(), CPU, hub_reachable=True)[0]
    assert "135M" in choose_model(TrainConfig(), T4, hub_reachable=False)[0]
    for card in ("T4", "RTX 4060", "RTX 2060"):
        model, _ = choose_model(TrainConfig(), KNOWN_GPUS[card], True)
        chosen = next(row for row in CATALOG.values() if row.id == model)
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


def test_the_menu_of_a_card_says_of_every_model_whether_it_fits(capsys, monkeypatch):
    assert fit_status(TrainConfig(), T4, LLAMA_8B)[0] == "fits"
    monkeypatch.setattr("sys.argv", ["menu", "RTX 4060", "--max-length", "1024"])
    menu.main()
    said = {line[6:32].strip(): (line[:6].strip(), line[38:].strip()) for line in capsys.readouterr().out.splitlines()}
    assert set(said) == set(CATALOG) and {status for status, _ in said.values()} == {"fits", "no"}
    assert fit_status(TrainConfig(max_length=2048), T4, CATALOG["Qwen3-14B"])[0] == "tight"
    assert said["Qwen3-14B"] == ("no", "")
    status, plan = fit_status(TrainConfig(max_length=1024), RTX_4060, QWEN_4B)
    assert said["Qwen3-4B"][0] == status == "fits" and f"{plan.peak_bytes / GIB:.1f} GiB" in said["Qwen3-4B"][1]


def test_two_cards_share_the_step_and_each_plan_is_per_card():
    one, two = (by_formula(settings={"effective_batch_size": 16}, gpus=gpus) for gpus in (1, 2))
    assert one.micro_batch * one.accumulation == 16 and two.micro_batch * two.accumulation * 2 == 16
    assert "x 2 GPUs = 16 examples" in str(two) and "on each GPU" in str(two) and "replicated (DDP)" in str(two)
    extra = {name: two.memory.parts.get(name, 0) for name in ("gradients on their way", "NCCL")}
    assert all(extra.values()) and not set(extra) & set(one.memory.parts)


def test_a_model_that_fits_no_single_card_fits_two_that_share_its_weights():
    model = CATALOG["Llama-2-13b-chat-hf"]
    card, large = (replace(KNOWN_GPUS[name], ram_free_bytes=64 * GIB) for name in ("RTX 4060", "RTX 4090"))
    with pytest.raises(DoesNotFit, match="sharded=True"):
        by_formula(card, model, gpus=2)
    plan, whole = make_plan(TrainConfig(), card, model, gpus=2, sharded=True), by_formula(large, model)
    assert plan.peak_bytes <= plan.budget and plan.measured is None and "sharded (FSDP2)" in str(plan)
    codes = model.shape.linear_parameters() / 2  # two in a byte; each card keeps half of them, and all scales
    assert plan.memory.parts["base weights"] == pytest.approx(whole.memory.parts["base weights"] - codes / 2, rel=0.001)


# ------------------------------------------------------------------------------------------------ cut by tokens


@pytest.mark.parametrize("card", ["T4", "RTX 3060", "RTX 4060"])
@pytest.mark.parametrize("model", ["Qwen2.5-1.5B-Instruct", "Llama-3.1-8B-Instruct"])
def test_a_ladder_goes_as_far_as_the_formula_and_no_token_further(card, model):
    """With the gradients that the earlier micro-batches of a step have left."""
    config, row = TrainConfig(**SIXTEEN), CATALOG[model]
    plan = by_formula(KNOWN_GPUS[card], row, SIXTEEN)
    gradients = 4 * row.shape.lora_parameters(config.r)
    for mode in plan.modes:
        about = replace(plan, checkpointing=mode.checkpointing, offload=mode.offload)
        for length, examples in mode.ladder:
            this, more = (
                gradients
                + estimate_of(config, replace(about, micro_batch=examples, seq_len=tokens), row.shape).total_bytes
                for tokens in (length, length + 1)
            )
            assert this <= plan.budget and (more > plan.budget or length == 1024)
    assert [mode.checkpointing for mode in plan.modes] == list(CHECKPOINTING)[: len(plan.modes)]
    assert any(mode.most_examples(1024) for mode in plan.modes) and plan.largest_bytes <= plan.budget
    per_token = [mode.seconds_per_token for mode in plan.modes]
    assert per_token == pytest.approx(sorted(per_token)) and all(mode.seconds_per_pass > 0 for mode in plan.modes)


def test_a_mode_that_has_room_for_a_whole_step_is_the_last():
    roomy = by_formula(KNOWN_GPUS["RTX 4090"], CATALOG["Qwen2.5-0.5B-Instruct"])
    assert [(mode.checkpointing, mode.ladder) for mode in roomy.modes] == [("off", ((512, 8),))]
    assert roomy.eval_mode.ladder == ((512, 48),)


def test_what_the_config_fixes_is_kept():
    assert {mode.checkpointing for mode in by_formula(settings={"gradient_checkpointing": "on"}).modes} == {"on"}
    off = by_formula(model=CATALOG["Qwen2.5-1.5B-Instruct"], settings={"gradient_checkpointing": "off"})
    assert {mode.checkpointing for mode in off.modes} == {off.checkpointing} == {"off"}
    two = by_formula(settings=SIXTEEN | {"micro_batch_size": 2}, lengths=ALPACA)
    assert (two.modes, two.micro_batch, two.accumulation, two.cut.pieces) == ((), 2, 8, 8)
    assert two.cut.most_tokens <= 2 * 1024 and "as the config says" in str(two)


def test_a_plan_says_how_steps_will_be_cut():
    plan, again = (by_formula(settings=SIXTEEN, lengths=ALPACA) for _ in range(2))
    assert str(plan) == str(again)
    cut = plan.cut
    assert 0 < cut.padding < 0.15 < 0.3 < cut.padding_if_equal and 2 < cut.pieces < 8
    said = f"16 examples per step in about {cut.pieces:.0f} micro-batches of up to {cut.most_tokens:,} tokens, checkpointing"
    assert said in plan.reasons[3] and f"{100 * cut.padding:.0f} % padding instead of" in plan.reasons[3]
    before = by_formula(settings=SIXTEEN)
    assert "their lengths are not known yet" in before.reasons[3]
    assert before.modes == plan.modes, (
        "what fits does not depend on the data, so a plan made before they are loaded holds"
    )
    known = with_cut(TrainConfig(**SIXTEEN), before, ALPACA)
    assert known.cut == cut and known.reasons[:4] == plan.reasons[:4] and len(known.reasons) == len(before.reasons)


def test_modes_that_are_needed_now_and_then_are_said():
    plan = by_formula(KNOWN_GPUS["RTX 4060"], settings=SIXTEEN, lengths=ALPACA)
    usual, other, *_ = plan.cut.steps_with
    assert f"({plan.cut.steps_with[other]} of 60 steps also need it {other}" in str(plan.cut)
    assert f"checkpointing {usual}" in str(plan.cut)


def test_equal_micro_batches_are_chosen_by_what_padding_costs():
    """As if all examples were as long as the longest, eight at a time would be the quickest on this card, and then mostly padding."""
    card = KNOWN_GPUS["RTX 3060"]
    unknown, known = (by_formula(card, settings=SIXTEEN, lengths=lengths) for lengths in (None, ALPACA))
    assert known.micro_batch < unknown.micro_batch and known.micro_batch * known.accumulation == 16


def test_an_allocator_that_cannot_grow_its_segments_gets_headroom():
    plain = replace(RTX_4060, expandable=False)
    here, there = (
        by_formula(card, CATALOG["Llama-3.2-3B-Instruct"], SIXTEEN)
        for card in (replace(RTX_4060, expandable=True), plain)
    )
    assert HEADROOM[False] >= 512 * MIB and here.budget - there.budget == HEADROOM[False] - HEADROOM[True]
    assert there.modes[0].ladder[0][0] < here.modes[0].ladder[0][0]


def test_a_cpu_cuts_into_as_many_tokens_as_two_of_the_longest_examples_have():
    plan = make_plan(TrainConfig(), CPU, CATALOG["SmolLM2-135M-Instruct"], lengths=[61, 300, 512, 48, 100, 90, 80, 70])
    assert (plan.micro_batch, plan.seq_len, plan.modes) == (2, 512, ()) and plan.cut.most_tokens <= 1024
    assert plan.cut.pieces <= 4 and plan.cut.padding < 0.1 < 0.3 < plan.cut.padding_if_equal


def test_lengths_of_fifty_thousand_examples_are_looked_at_in_no_time():
    lengths, config = ALPACA * 25, TrainConfig(**SIXTEEN)
    started = time.perf_counter()
    plan = make_plan(config, T4, LLAMA_8B, exact=False, lengths=lengths)
    planned = time.perf_counter() - started
    started = time.perf_counter()
    for start in range(0, 1600, 16):
        cut(lengths[start : start + 16], plan.modes)
    assert len(lengths) > 50_000 and planned < 0.5 and (time.perf_counter() - started) / 100 < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(("card", "model"), [("RTX 4060", "Llama-3.1-8B-Instruct"), ("T4", "Llama-3.2-3B-Instruct")])
def test_dry_runs_settle_the_ladders(card, model, say, tmp_path, monkeypatch):
    """What was not dry-run fits too, with what is kept for it; and what a micro-batch costs is told."""
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    measure(Step(CATALOG["SmolLM2-135M-Instruct"].shape.to_config(), 1, 64))  # the process of dry runs is there
    config, gpu, row = TrainConfig(**SIXTEEN), KNOWN_GPUS[card], CATALOG[model]
    took = []
    for _ in range(2):
        started = time.perf_counter()
        plan = make_plan(config, gpu, row, lengths=ALPACA * 25)
        took.append(time.perf_counter() - started)
    limit, off = plan.budget + HEADROOM[gpu.expandable] - CUDA_CONTEXT, []
    ways = [(mode, "train") for mode in plan.modes] + [(plan.eval_mode, "evaluate")]
    for mode, phase in ways:
        about = replace(plan, checkpointing=mode.checkpointing, offload=mode.offload)
        for length, examples in mode.ladder:
            step = step_of(config, replace(about, seq_len=length), row.shape, phase, examples)
            run = measure(replace(step, accumulating=phase == "train"))
            assert run.reserved <= limit, (mode.checkpointing, phase, examples, length)
            if phase == "train":
                off.append(mode.seconds(examples, length) / speed(gpu).seconds(run.flops, run.bytes_moved) - 1)
    say(f"{card}, {model}: planned in {took[0]:.1f} s, then {took[1]:.2f} s; costs within {max(map(abs, off)):.1%}")
    assert took[0] < 20 * 1.5 and took[1] < 1 and max(map(abs, off)) < 0.05

import pytest

from helpers.catalog import CATALOG
from helpers.config import TrainConfig
from helpers.hardware import GIB, KNOWN_GPUS, Gpu
from helpers.planner import DoesNotFit, choose_model, make_plan

CPU = Gpu("CPU", "cpu", 16 * GIB, 12 * GIB)
T4, RTX_4060 = KNOWN_GPUS["T4"], KNOWN_GPUS["RTX 4060"]


@pytest.mark.parametrize("card", ["T4", "RTX 3060", "RTX 4060", "RTX 4090"])
@pytest.mark.parametrize("model", ["Llama-3.2-1B-Instruct", "Llama-3.2-3B-Instruct", "Qwen2.5-7B-Instruct"])
@pytest.mark.parametrize("effective_batch", [1, 7, 8, 16])
def test_a_plan_fits_and_keeps_the_effective_batch(card, model, effective_batch):
    config = TrainConfig(effective_batch_size=effective_batch)
    plan = make_plan(config, KNOWN_GPUS[card], CATALOG[model])
    assert plan.micro_batch * plan.accumulation == effective_batch
    assert plan.memory.total_bytes < KNOWN_GPUS[card].free_bytes


def test_a_bigger_card_is_never_planned_slower():
    config = TrainConfig(max_length=1024, effective_batch_size=16)
    plans = [make_plan(config, KNOWN_GPUS[card], CATALOG["Llama-3.2-3B-Instruct"]) for card in ("RTX 4060", "T4", "RTX 4090")]
    assert [plan.checkpointing for plan in plans] == sorted([plan.checkpointing for plan in plans], reverse=True)
    small, _, large = plans
    assert (not large.checkpointing, large.micro_batch) >= (not small.checkpointing, small.micro_batch)


def test_every_choice_is_explained():
    text = str(make_plan(TrainConfig(max_length=2048), T4, CATALOG["Llama-3.1-8B-Instruct"]))
    for word in ("fp16", "attention", "micro-batch", "checkpointing on: off would need", "GiB"):
        assert word in text


def test_what_does_not_fit_says_by_how_much_and_what_to_do():
    with pytest.raises(DoesNotFit, match=r"13b.* needs .* GiB .* has .* GiB .*smaller model"):
        make_plan(TrainConfig(max_length=4096), KNOWN_GPUS["RTX laptop 6GB"], CATALOG["Llama-2-13b-chat-hf"])


def test_a_cpu_is_planned_in_fp32_with_small_micro_batches():
    plan = make_plan(TrainConfig(), CPU, CATALOG["SmolLM2-135M-Instruct"])
    assert (plan.dtype, plan.micro_batch, plan.optimizer) == ("float32", 2, "adamw_torch")


def test_auto_picks_the_embedded_model_without_gpu_or_hub_and_a_larger_one_otherwise():
    assert "135M" in choose_model(TrainConfig(), CPU, hub_reachable=True)[0]
    assert "135M" in choose_model(TrainConfig(), T4, hub_reachable=False)[0]
    for card in ("T4", "RTX 4060", "RTX 2060"):
        chosen = next(row for row in CATALOG.values() if row.id == choose_model(TrainConfig(), KNOWN_GPUS[card], True)[0])
        assert not chosen.gated and 1e9 < chosen.shape.parameters() < 3.2e9


def test_one_line_of_config_chooses_another_model():
    assert choose_model(TrainConfig(model="Qwen3-8B"), T4, True)[0] == "Qwen/Qwen3-8B"
    assert choose_model(TrainConfig(model="/my/folder"), T4, True)[0] == "/my/folder"


def test_a_model_that_is_not_on_the_menu_is_planned_from_its_config_file(tiny_model):
    plan = make_plan(TrainConfig(), CPU, str(tiny_model))
    assert plan.memory is not None and plan.memory.total_bytes < GIB


def test_an_unknown_model_gets_the_safest_settings():
    plan = make_plan(TrainConfig(), T4, "nobody/knows-this")
    assert (plan.micro_batch, plan.checkpointing, plan.memory) == (1, True, None)

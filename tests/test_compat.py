"""What the kit changes in other libraries: that it does what it says, and what happens where a name is gone."""

import functools
import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import trl.kernels.chunked_logprob as trl_kernels
import trl.models
import trl.trainer.utils as trl_utils
from conftest import make_job
from transformers.integrations import sdpa_attention

from helpers import compat
from helpers import train as training
from helpers.compat import get_checkpointing, set_checkpointing
from helpers.config import TrainConfig
from helpers.hardware import KNOWN_GPUS, Gpu
from helpers.models import attach_lora, load_quantized
from helpers.planner import make_plan
from helpers.train import build_trainer, train, with_working_head

CONFIG = TrainConfig(model="SmolLM2-360M-Instruct")
MODES = ("off", "selective", "on")


# --------------------------------------------------------------------------------------------------- checkpointing


def mode_of_layers(model):
    """Read from the function that each layer calls: none, PyTorch's checkpoint, or that with TRL's context."""
    functions = [
        module._gradient_checkpointing_func if module.gradient_checkpointing else None
        for module in model.modules()
        if hasattr(module, "gradient_checkpointing")
    ]
    kinds = {"off" if f is None else "selective" if "context_fn" in f.keywords else "on" for f in functions}
    assert len(functions) >= 2 and len(kinds) == 1
    return kinds.pop()


@pytest.fixture(scope="module")
def model(tiny_model):
    job = make_job(tiny_model, [{"instruction": f"{n}?", "output": str(n)} for n in range(24)])
    return attach_lora(job["model"], job["config"])


@pytest.mark.parametrize("first, second", itertools.product(MODES, MODES))
def test_a_switch_sets_exactly_its_mode_whatever_was_set_before(model, first, second):
    for mode in (first, second):
        set_checkpointing(model, mode)
        assert get_checkpointing(model) == mode_of_layers(model) == mode
        if mode != "off":  # Trainer switches on again when training begins; that must not change what kind of on it is
            # Looked up each time: for "selective", TRL lays another method over the model.
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
            assert mode_of_layers(model) == mode


@pytest.mark.parametrize("mode", MODES)
def test_each_mode_trains_and_gives_the_same_gradient(model, mode):
    ids = torch.arange(40)[None] + 5

    def gradient(mode):
        set_checkpointing(model, mode)
        model.train()
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])

    assert torch.allclose(gradient(mode), gradient("off"), atol=1e-6)


def test_a_plan_with_selective_checkpointing_trains_selectively(job, tmp_path):
    """Trainer's own switch reaches the base model past TRL's, on transformers 5.16 and newer."""
    job["plan"] = replace(job["plan"], checkpointing="selective")
    run = train(**job, root=tmp_path)
    assert run.finished and mode_of_layers(run.model) == "selective"
    job["config"].name, job["plan"] = "next", replace(job["plan"], checkpointing="on")
    assert mode_of_layers(train(**job, root=tmp_path).model) == "on"


def test_without_trls_function_selective_becomes_on(model, monkeypatch):
    monkeypatch.setattr(trl.models, "enable_selective_activation_checkpointing", None)
    set_checkpointing(model, "selective")
    assert mode_of_layers(model) == "on"


# -------------------------------------------------------------------------------------------------------- loss head


def test_where_triton_cannot_run_the_probe_says_so_and_leaves_trl_as_it_was():
    before = trl_kernels._use_triton
    compat.triton_works.cache_clear()
    assert compat.triton_works() is False and compat.working_head() == "torch"  # there is no card here
    assert trl_kernels._use_triton is before


@pytest.fixture
def planned(monkeypatch):
    """A plan for a card where Triton is installed, and what its probe is said to find."""
    monkeypatch.setattr("helpers.hardware._torch_without_triton", lambda: False)

    def plan(card, found=None):
        if found:
            monkeypatch.setattr(training, "working_head", lambda: found)
        return make_plan(CONFIG, KNOWN_GPUS[card], exact=False)

    return plan


@pytest.mark.slow
def test_the_plan_is_made_again_for_the_torch_path(planned, capsys):
    plan = planned("RTX 3060")
    assert plan.loss_head == "triton"
    changed = with_working_head(CONFIG, plan)
    assert changed.loss_head == "torch" and changed.memory.total_bytes >= plan.memory.total_bytes
    assert "plan is made anew, because TRL's Triton kernels do not run here" in capsys.readouterr().out


def test_a_t4_whose_triton_works_uses_it_within_the_plan_for_plain_torch(planned, capsys):
    plan = planned("T4", found="triton")
    changed = with_working_head(CONFIG, plan)
    assert (plan.loss_head, changed.loss_head) == ("torch", "triton") and changed.peak_bytes == plan.peak_bytes
    assert "less memory than planned" in capsys.readouterr().out
    assert with_working_head(CONFIG, changed) is changed  # a plan whose head works stays


def test_a_trainer_built_by_hand_is_probed_too(job, tmp_path, monkeypatch):
    job["plan"] = replace(job["plan"], loss_head="triton")
    asked = []
    monkeypatch.setattr(training, "working_head", lambda: asked.append(1) or "torch")
    build_trainer(**job, output_dir=tmp_path)
    assert asked and trl_kernels._use_triton(torch.device("cuda")) is False


@pytest.mark.parametrize(
    "head, device, wanted", [("torch", "cuda", False), ("triton", "cuda", True), ("triton", "cpu", False)]
)
def test_the_head_runs_as_planned(monkeypatch, head, device, wanted):
    for module, names in compat.TRL_NAMES.items():
        for name in names:
            monkeypatch.setattr(module, name, getattr(module, name))
    compat.use_loss_head(head, 1024)
    assert trl_kernels._use_triton(torch.device(device)) is wanted
    assert trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE == 1024 and trl_utils._use_triton(torch.device(device))


@pytest.mark.parametrize(
    "module, name",
    [(module, name) for module, names in compat.TRL_NAMES.items() for name in names],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_name_that_trl_no_longer_has_is_missed_and_nothing_is_assigned(monkeypatch, module, name):
    monkeypatch.delattr(module, name)
    assert compat.missing_names() == [f"{module.__name__}.{name}"] and compat.working_head() == "full"
    before = {n: getattr(trl_utils, n, None) for n in ("_CHUNKED_LOGPROB_CHUNK_SIZE", "_use_triton")}
    compat.use_loss_head("torch", 1024)
    assert before == {n: getattr(trl_utils, n, None) for n in before} and not hasattr(module, name)


def test_full_logits_give_the_loss_and_the_gradient_of_trls_head(job, tmp_path, monkeypatch):
    """What is trained where TRL is not built as the kit knows it: transformers' own loss, accumulation and padding included."""
    found = []
    for head in ("torch", "full"):
        job["plan"] = replace(job["plan"], loss_head=head, gpu=replace(job["plan"].gpu, fused_head=head))
        trainer = build_trainer(**job, output_dir=tmp_path)
        trainer.model.train()
        batches, tokens = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 2, torch.device("cpu"))
        losses = [trainer.training_step(trainer.model, batch, tokens).item() for batch in batches]
        grads = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.requires_grad])
        found.append((losses, grads, trainer.evaluate()["eval_loss"]))
    (one, gradient, loss), (other, other_gradient, other_loss) = found
    assert other == pytest.approx(one, abs=1e-5) and other_loss == pytest.approx(loss, abs=1e-5)
    assert torch.allclose(gradient, other_gradient, atol=1e-6) and gradient.abs().max() > 0


def test_a_plan_says_when_trl_is_not_as_the_kit_knows_it(monkeypatch, job, tmp_path, capsys):
    def measure(step):
        assert step.loss_head == "full", "planned with TRL's head"
        return SimpleNamespace(reserved=2**30, allocated=2**30, flops=1, bytes_moved=1)

    monkeypatch.setattr("helpers.planner.missing_names", lambda: ["trl.x"])
    for room in ("planner", "modes"):
        monkeypatch.setattr(f"helpers.{room}.measure_once", measure)
    plan = make_plan(CONFIG, KNOWN_GPUS["T4"])
    assert plan.loss_head == "full" and "all logits at once" in str(plan)
    monkeypatch.setattr(training, "working_head", lambda: "full")  # in training, where the plan was made by the formula
    run = train(**job, root=tmp_path)
    assert run.finished and run.plan["loss_head"] == "full"
    assert "computes its loss in an unknown way" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------- attention, several cards


@pytest.mark.parametrize(
    "card, repeated",
    [
        (KNOWN_GPUS["T4"], True),
        (KNOWN_GPUS["RTX 3060"], False),
        (replace(KNOWN_GPUS["RTX 3060"], flash=False), True),
    ],
)
def test_keys_are_repeated_for_cards_without_flash_attention(tiny_model, monkeypatch, card, repeated):
    monkeypatch.setattr(sdpa_attention, "use_gqa_in_sdpa", sdpa_attention.use_gqa_in_sdpa)
    config = TrainConfig(model=str(tiny_model), max_length=128)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr("helpers.models.AutoModelForCausalLM.from_pretrained", lambda *args, **kwargs: 1 / 0)
        load_quantized(config, make_plan(config, card, exact=False))
    key = torch.zeros(1, 2, 4, 16)
    assert sdpa_attention.use_gqa_in_sdpa(None, key, key) is not repeated


def test_with_two_visible_cards_one_is_trained_on(job, tmp_path, monkeypatch):
    """As on Kaggle: Trainer would spread a 4-bit model over both, and TRL refuses in its constructor."""
    make_arguments = training.sft_config

    def two_visible(*args):
        arguments = make_arguments(*args)
        assert arguments.n_gpu < 2  # asked once, Trainer's arguments know the machine ...
        arguments._n_gpu = 2  # ... which has two cards
        return arguments

    monkeypatch.setattr(training, "sft_config", two_visible)
    assert build_trainer(**job, output_dir=tmp_path).args.n_gpu == 1
    monkeypatch.setattr(training, "use_one_card", lambda arguments: None)
    with pytest.raises(ValueError, match="DataParallel"):
        build_trainer(**job, output_dir=tmp_path)


# --------------------------------------------------------------------------------------------------- a card that shrinks


def test_a_card_that_shrinks_between_plan_and_training_is_planned_again(monkeypatch, capsys):
    """Another program takes 2 GiB while the notebook is open."""
    config, fresh = TrainConfig(max_length=2048), SimpleNamespace(plan={})
    plan = make_plan(config, KNOWN_GPUS["RTX 4060"], "meta-llama/Llama-3.2-3B-Instruct", exact=False)
    now = replace(KNOWN_GPUS["RTX 4060"], free_bytes=plan.gpu.free_bytes - 2 * 2**30, has_context=True)
    monkeypatch.setattr(training, "detect_gpu", lambda: now)
    monkeypatch.setattr(training, "working_head", lambda: plan.loss_head)
    monkeypatch.setattr(training, "make_plan", functools.partial(make_plan, exact=False))
    changed = training._planned_for_now(config, plan, fresh)
    assert plan.peak_bytes > now.free_bytes > changed.peak_bytes
    assert changed.micro_batch * changed.accumulation == plan.micro_batch * plan.accumulation == 8
    assert "6.0 GiB of NVIDIA GeForce RTX 4060 are free now, 8.0 when it was planned" in capsys.readouterr().out
    monkeypatch.setattr(training, "detect_gpu", lambda: replace(now, free_bytes=plan.gpu.free_bytes - 90 * 2**20))
    assert training._planned_for_now(config, plan, fresh) is plan  # within the reserve


def test_where_nothing_fits_any_more_that_is_said_before_the_first_step(monkeypatch):
    from helpers.planner import DoesNotFit

    plan = make_plan(TrainConfig(), KNOWN_GPUS["RTX 4060"], "meta-llama/Llama-3.1-8B-Instruct", exact=False)
    monkeypatch.setattr(training, "detect_gpu", lambda: replace(KNOWN_GPUS["RTX 4060"], free_bytes=3 * 2**30))
    monkeypatch.setattr(training, "working_head", lambda: plan.loss_head)
    with pytest.raises(DoesNotFit, match="MiB too little"):
        training._planned_for_now(TrainConfig(), plan, SimpleNamespace(plan={}))


def test_a_run_begun_with_another_optimizer_is_planned_with_it(monkeypatch, capsys):
    monkeypatch.setattr(training, "working_head", lambda: "torch")
    plan = make_plan(CONFIG, KNOWN_GPUS["T4"], exact=False)
    monkeypatch.setattr(training, "make_plan", functools.partial(make_plan, exact=False))
    changed = training._planned_for_now(CONFIG, plan, SimpleNamespace(plan={"optimizer": "adamw_torch"}))
    assert changed.optimizer == "adamw_torch" and changed.memory.parts["optimizer"] > 3 * plan.memory.parts["optimizer"]
    assert "this run was begun with adamw_torch" in capsys.readouterr().out
    cpu, begun = make_plan(CONFIG, Gpu("CPU", "cpu", 2**35, 2**34)), SimpleNamespace(plan={"optimizer": "adamw_8bit"})
    assert training._planned_for_now(CONFIG, cpu, begun).optimizer == "adamw_8bit"

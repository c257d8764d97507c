"""TRL's Triton kernels are tried on one tile; where they fail, the plan is made again for the torch path."""

import pytest
import trl.kernels.chunked_logprob as trl_kernels

from helpers.config import TrainConfig
from helpers.hardware import KNOWN_GPUS
from helpers.loss_head import triton_works, use_loss_head, with_working_loss_head
from helpers.planner import make_plan

CONFIG = TrainConfig(model="SmolLM2-360M-Instruct")


def test_where_triton_cannot_run_the_probe_says_so_and_leaves_trl_as_it_was():
    before = trl_kernels._use_triton
    assert triton_works() is False  # there is no card here
    assert trl_kernels._use_triton is before


@pytest.mark.slow
def test_the_plan_is_made_again_for_the_torch_path(monkeypatch, capsys):
    monkeypatch.setattr("helpers.hardware._torch_without_triton", lambda: False)
    plan = make_plan(CONFIG, KNOWN_GPUS["RTX 3060"], exact=False)
    assert plan.loss_head == "triton"
    changed = with_working_loss_head(CONFIG, plan)
    assert changed.loss_head == "torch" and changed.memory.total_bytes >= plan.memory.total_bytes
    assert "plan is made anew" in capsys.readouterr().out
    monkeypatch.setattr("helpers.loss_head.triton_works", lambda: True)
    assert with_working_loss_head(CONFIG, plan) is plan


def test_the_torch_plan_never_reaches_triton(monkeypatch):
    import torch

    plan = make_plan(CONFIG, KNOWN_GPUS["T4"], exact=False)
    monkeypatch.setattr(trl_kernels, "_use_triton", trl_kernels._use_triton)
    use_loss_head(plan)
    assert trl_kernels._use_triton(torch.device("cuda")) is False

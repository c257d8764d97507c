"""TRL's loss head, run as it was planned: which kernels, how large a tile, and only where a token is trained."""

from __future__ import annotations

from dataclasses import replace

import torch
import trl.kernels.chunked_logprob as trl_kernels
import trl.trainer.utils as trl_utils

from helpers.config import TrainConfig
from helpers.planner import Plan, make_plan


def use_loss_head(plan: Plan) -> None:
    """Set TRL up for `plan`, for as long as this process lives.

    Without Triton, TRL 1.16 projects every position to the whole vocabulary, prompts included, and masks afterwards. On two
    CPU cores, a step of the embedded model is a fifth faster and needs a gigabyte less without that; the loss is the same.
    """
    trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE = plan.loss_tile
    if hasattr(trl_utils, "_use_triton"):  # private, so it may go: then training is only slower
        trl_utils._use_triton = lambda device: True
    trl_kernels._use_triton = lambda device: plan.loss_head == "triton" and device.type == "cuda"


def with_working_loss_head(config: TrainConfig, plan: Plan) -> Plan:
    """`plan`; or another, made for TRL's torch path, if its Triton kernels do not run on this card after all."""
    if plan.loss_head != "triton" or triton_works():
        return plan
    print("TRL's Triton kernels do not run here, so the loss is computed in plain torch, and the plan is made anew for that:")
    changed = make_plan(config, replace(plan.gpu, triton=False), plan.model)
    print(changed)
    return changed


def triton_works() -> bool:
    """Do the Triton kernels give, on one small tile, what the torch path gives, forward and backward?"""
    before, answers = trl_kernels._use_triton, []
    try:
        numbers = torch.Generator("cuda").manual_seed(0)  # our own, so that the run's random numbers stay as they are
        hidden = torch.randn(4, 64, device="cuda", generator=numbers)
        weight = torch.randn(128, 64, device="cuda", generator=numbers)
        targets = torch.tensor([1, 2, 3, 127], device="cuda")
        for choice in (True, False):
            trl_kernels._use_triton = lambda device, choice=choice: choice
            leaf = hidden.clone().requires_grad_()
            log_probs = trl_kernels.ChunkedLogProbFunction.apply(leaf, weight, None, targets, 1.0, 128)[0]
            log_probs.sum().backward()
            answers.append((log_probs.detach(), leaf.grad))
        return all(torch.allclose(one, other, atol=1e-3) for one, other in zip(*answers))
    except Exception:  # no card, a compiler, a driver, an instruction: whatever is missing, the torch path works without it
        return False
    finally:
        trl_kernels._use_triton = before

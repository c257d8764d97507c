"""Every kind of training step that plans may choose is trained: two steps and an evaluation, on a CPU that pretends to be the card.

A micro-batch is another piece of code than the next by its arithmetic, loss head and mode of checkpointing, and by whether it is padded. All of
their combinations are trained, whichever of them plans choose today.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from card import card_plan, pretend_card
from conftest import make_job

from helpers import train as training
from helpers.compat import get_checkpointing
from helpers.config import TrainConfig
from helpers.cutting import Mode
from helpers.data import lengths
from helpers.hardware import KNOWN_GPUS
from helpers.models import load_quantized
from helpers.planner import DoesNotFit, make_plan
from helpers.registry import CATALOG
from helpers.trainer import OOMSafeTrainer

# In each step of four there are short answers and long ones.
ROWS = [{"instruction": f"Count to {n}.", "output": " ".join(map(str, range(1, n % 7 + 2)))} for n in range(16)]
PACKED = torch.uint8  # two weights of 4 bits in a byte
DTYPES = ("float16", "bfloat16", "float32")
HEADS = ("torch", "triton")
KINDS = (
    ("off", False),
    ("selective", False),
    ("on", False),
    ("on", True),
)  # checkpointing, and do activations wait in host memory
COMBINATIONS = [(dtype, head, *kind) for dtype, head, kind in itertools.product(DTYPES, HEADS, KINDS)]


def name_of(dtype: str, head: str, checkpointing: str, offload: bool) -> str:
    return "-".join([dtype, checkpointing, *["offload"] * offload, head])


def examples_at_once(monkeypatch) -> set[int]:
    """Fills while training goes on."""
    sizes, compute = set(), OOMSafeTrainer.compute_loss

    def seen(self, model, inputs, *args, **kwargs):
        if model.training:
            sizes.add(len(inputs["input_ids"]))
        return compute(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(OOMSafeTrainer, "compute_loss", seen)
    return sizes


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtype, head, checkpointing, offload", COMBINATIONS, ids=[name_of(*one) for one in COMBINATIONS]
)
def test_what_a_plan_may_choose_trains_and_evaluates(
    dtype, head, checkpointing, offload, tiny_model, tmp_path, monkeypatch
):
    job = make_job(tiny_model, ROWS, max_steps=2, num_evaluations=1, effective_batch_size=4, max_eval_samples=2)
    witness = pretend_card(monkeypatch)
    found = sorted(lengths(job["training"], job["tokenizer"]))
    # The longer half alone, the others in twos: the fewest passes that this ladder allows.
    mode = Mode(checkpointing, offload, ((found[len(found) // 2], 2), (128, 1)), 1.0, 1e-9)
    changes = {"checkpointing": checkpointing, "offload": offload, "micro_batch": 2, "accumulation": 2, "eval_batch": 2}
    job["plan"] = card_plan(job["plan"], dtype, head, modes=(mode,), **changes)
    job["model"], _ = load_quantized(job["config"], job["plan"])
    sizes = examples_at_once(monkeypatch)
    run = training.train(**job, root=tmp_path)
    losses = [event[key] for event in run.history for key in ("loss", "eval_loss") if key in event]
    assert run.finished and witness.steps == 2 and len(losses) >= 3 and all(map(math.isfinite, losses))
    assert get_checkpointing(run.model) == checkpointing
    assert sizes == {1, 2}, "alone and padded"
    assert witness.adapter_dtypes == {torch.float32}
    assert witness.other_dtypes == {PACKED, getattr(torch, dtype)}
    assert (witness.trainer.accelerator.scaler is not None) == (dtype == "float16")
    assert type(witness.trainer.optimizer.optimizer).__module__.startswith("bitsandbytes")  # 8-bit AdamW


@pytest.mark.slow
def test_plans_choose_nothing_else(say):
    """Every card x model x length, by the formula: dry runs decide how large a micro-batch may be, not how it may run."""
    chosen = set()
    for (card, gpu), row, length in itertools.product(KNOWN_GPUS.items(), CATALOG.values(), (256, 512, 1024, 2048)):
        try:
            plan = make_plan(TrainConfig(max_length=length), gpu, row, exact=False)
        except DoesNotFit:
            continue
        chosen |= {(plan.dtype, plan.loss_head, mode.checkpointing, mode.offload) for mode in plan.modes}
        assert (plan.dtype, plan.loss_head, plan.checkpointing, plan.offload) in chosen, (card, row.id)
    say(f"plans choose {len(chosen)} of the {len(COMBINATIONS)} combinations that are trained")
    assert chosen <= set(COMBINATIONS) and {one[0] for one in chosen} == set(DTYPES)
    assert {one[1] for one in chosen} == set(HEADS) and {one[2:] for one in chosen} == set(KINDS)

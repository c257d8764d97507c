"""Every kind of training step that plans choose is trained: two steps and an evaluation, on a CPU that pretends to be the card."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from card import card_plan, pretend_card
from conftest import make_job

from benchmarks import combinations
from benchmarks.combinations import Combination
from helpers import train as training
from helpers.compat import get_checkpointing
from helpers.models import load_quantized

# Answers of different lengths, so that a micro-batch of two is padded.
ROWS = [{"instruction": f"Count to {n}.", "output": " ".join(map(str, range(1, n % 7 + 2)))} for n in range(16)]
PACKED = torch.uint8  # two weights of 4 bits in a byte


def rehearsed() -> list[Combination]:
    """The committed list, and each of it with the other loss head, because a probe before training may decide so."""
    _, listed = combinations.recorded()
    return sorted({c for one in listed for c in (one, one.with_the_other_head())}, key=str)


def name_of(c: Combination) -> str:
    return "-".join([c.dtype, c.checkpointing, *["offload"] * c.offload, c.loss_head, *["padded"] * c.masked])


@pytest.mark.slow
@pytest.mark.parametrize("combination", rehearsed(), ids=name_of)
def test_what_a_plan_may_choose_trains_and_evaluates(combination, tiny_model, tmp_path, monkeypatch, say):
    job = make_job(tiny_model, ROWS, max_steps=2, num_evaluations=1, effective_batch_size=2, max_eval_samples=2)
    witness = pretend_card(monkeypatch)
    micro_batch = 2 if combination.masked else 1
    job["plan"] = card_plan(
        job["plan"],
        combination.dtype,
        combination.loss_head,
        checkpointing=combination.checkpointing,
        offload=combination.offload,
        micro_batch=micro_batch,
        accumulation=2 // micro_batch,
        eval_batch=micro_batch,
    )
    job["model"], _ = load_quantized(job["config"], job["plan"])
    run = training.train(**job, root=tmp_path)
    losses = [event[key] for event in run.history for key in ("loss", "eval_loss") if key in event]
    assert run.finished and witness.steps == 2 and len(losses) >= 3 and all(map(math.isfinite, losses))
    assert get_checkpointing(run.model) == combination.checkpointing
    assert witness.adapter_dtypes == {torch.float32}
    assert witness.other_dtypes == {PACKED, getattr(torch, combination.dtype)}
    assert (witness.trainer.accelerator.scaler is not None) == (combination.dtype == "float16")
    assert type(witness.trainer.optimizer.optimizer).__module__.startswith("bitsandbytes")  # 8-bit AdamW


@pytest.mark.slow
def test_the_list_is_of_this_planner_and_this_menu():
    fingerprint, listed = combinations.recorded()
    assert combinations.fingerprint() == fingerprint, (
        "planner or menu changed: python -m benchmarks.combinations, and commit the list"
    )
    assert len(listed) == len(set(listed)) >= 10


@pytest.mark.slow
def test_plans_made_anew_choose_nothing_that_is_not_on_the_list(say):
    fingerprint, listed = combinations.recorded()
    found = list(combinations.chosen(combinations.seeded_cases(40, fingerprint), exact=True))
    unlisted = {(*case, c) for case, c in found if c is not None and c not in listed}
    fitting = [c for _, c in found if c is not None]
    say(
        f"40 plans made anew: {len(fitting)} fit and choose {len(set(fitting))} of the {len(listed)} combinations on the list"
    )
    assert not unlisted and len(fitting) >= 20


def test_another_planner_has_another_fingerprint(monkeypatch):
    """A menu with one model and two cards will do."""
    from helpers import planner

    monkeypatch.setattr(
        combinations, "cases", lambda: [(card, "Qwen2.5-0.5B-Instruct", 512) for card in ("T4", "RTX 4060")]
    )
    before = combinations.fingerprint()
    assert combinations.fingerprint() == before
    row = combinations.CATALOG["Qwen2.5-0.5B-Instruct"]
    with monkeypatch.context() as patch:
        patch.setitem(
            combinations.CATALOG, "Qwen2.5-0.5B-Instruct", replace(row, shape=replace(row.shape, hidden_size=960))
        )
        assert combinations.fingerprint() != before
    monkeypatch.setattr(planner, "CHECKPOINTING", ("on",))
    assert combinations.fingerprint() != before

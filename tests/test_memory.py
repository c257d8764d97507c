import time

import pytest

from helpers.memory import GIB, estimate, levers, nf4_bytes
from helpers.registry import CATALOG

LLAMA_8B = CATALOG["Llama-3.1-8B-Instruct"].shape


def test_nf4_with_double_quantization_takes_4_127_bits_per_weight():
    assert nf4_bytes(2**30) * 8 / 2**30 == 4.126953125
    assert nf4_bytes(2**30, double_quant=False) * 8 / 2**30 == 4.5


def test_parts_add_up_and_are_all_positive():
    for checkpointing in ("off", "selective", "on"):
        result = estimate(LLAMA_8B, 1, 2048, checkpointing=checkpointing)
        assert sum(result.parts.values()) == result.total_bytes
        assert all(size > 0 for size in result.parts.values())


def test_checkpointing_and_shorter_examples_save_memory():
    full = estimate(LLAMA_8B, 1, 2048, checkpointing="off").total_bytes
    saved = estimate(LLAMA_8B, 1, 2048, checkpointing="on").total_bytes
    assert saved < 0.5 * full
    assert estimate(LLAMA_8B, 1, 1024).total_bytes < saved


def test_an_8b_model_fits_an_8_gb_card_with_checkpointing_only():
    assert estimate(LLAMA_8B, 1, 512, checkpointing="on").total_bytes < 7.5 * GIB
    assert estimate(LLAMA_8B, 1, 2048, checkpointing="off").total_bytes > 16 * GIB


def test_batched_examples_cost_their_tokens_and_an_attention_mask():
    together, alone = (estimate(LLAMA_8B, batch, 2048 // batch, attention="efficient").total_bytes for batch in (4, 1))
    assert (
        0 < together - alone <= 4 * 512**2 * (1 + 2)
    )  # a byte for each pair of tokens, and a bias of two in one layer


@pytest.mark.parametrize(
    ("change", "smaller"),
    [
        ({"quantization": "none"}, False),
        ({"loss_head": "torch"}, False),
        ({"optimizer_bytes": 8}, False),
        ({"r": 64}, False),
        ({"offload": True}, True),
        ({"attention": "efficient"}, False),
    ],
)
def test_each_lever_moves_memory_the_right_way(change, smaller):
    plain, changed = estimate(LLAMA_8B, 1, 2048).total_bytes, estimate(LLAMA_8B, 1, 2048, **change).total_bytes
    assert changed < plain if smaller else changed >= plain


def test_the_formula_is_instant():
    started = time.perf_counter()
    for _ in range(100):
        estimate(LLAMA_8B, 1, 2048)
    assert (time.perf_counter() - started) / 100 < 2e-3


def test_each_lever_of_the_teaching_bar_saves_memory():
    totals = [row.total_bytes for row in levers(LLAMA_8B, 1, 2048).values()]
    assert totals == sorted(totals, reverse=True) and totals[-1] < 0.6 * totals[0]

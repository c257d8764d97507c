import time

from helpers.catalog import CATALOG
from helpers.memory import GIB, estimate, nf4_bytes

LLAMA_8B = CATALOG["Llama-3.1-8B-Instruct"].shape


def test_nf4_with_double_quantisation_takes_4_127_bits_per_weight():
    assert nf4_bytes(2**30) * 8 / 2**30 == 4.126953125
    assert nf4_bytes(2**30, double_quant=False) * 8 / 2**30 == 4.5


def test_parts_add_up_and_are_all_positive():
    for checkpointing in (False, True):
        result = estimate(LLAMA_8B, 1, 2048, checkpointing=checkpointing)
        assert sum(result.parts.values()) == result.total_bytes
        assert all(size > 0 for size in result.parts.values())


def test_checkpointing_and_shorter_examples_save_memory():
    full = estimate(LLAMA_8B, 1, 2048, checkpointing=False).total_bytes
    saved = estimate(LLAMA_8B, 1, 2048, checkpointing=True).total_bytes
    assert saved < 0.5 * full
    assert estimate(LLAMA_8B, 1, 1024).total_bytes < saved


def test_an_8b_model_fits_an_8_gb_card_with_checkpointing_only():
    assert estimate(LLAMA_8B, 1, 512, checkpointing=True).total_bytes < 7.5 * GIB
    assert estimate(LLAMA_8B, 1, 2048, checkpointing=False).total_bytes > 16 * GIB


def test_peak_depends_on_tokens_not_on_how_they_are_batched():
    assert estimate(LLAMA_8B, 4, 512).total_bytes == estimate(LLAMA_8B, 1, 2048).total_bytes


def test_the_formula_is_instant():
    started = time.perf_counter()
    for _ in range(100):
        estimate(LLAMA_8B, 1, 2048)
    assert (time.perf_counter() - started) / 100 < 2e-3

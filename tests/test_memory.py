import time

import pytest

from helpers.hardware import GIB, loaded_tensors
from helpers.memory import estimate, nf4_bytes
from helpers.registry import CATALOG

LLAMA_8B = CATALOG["Llama-3.1-8B-Instruct"].shape


def test_nf4_with_double_quantization_takes_4_127_bits_per_weight():
    assert nf4_bytes(2**30) * 8 / 2**30 == 4.126953125
    assert nf4_bytes(2**30, double_quant=False) * 8 / 2**30 == 4.5


def test_an_8b_model_fits_an_8_gb_card_with_checkpointing_only():
    assert estimate(LLAMA_8B, 1, 512, checkpointing="on").total_bytes < 7.5 * GIB
    assert estimate(LLAMA_8B, 1, 2048, checkpointing="off").total_bytes > 16 * GIB


def test_batched_examples_cost_their_tokens_and_an_attention_mask():
    together, alone = (estimate(LLAMA_8B, batch, 2048 // batch, attention="efficient").total_bytes for batch in (4, 1))
    pairs = 4 * 512**2
    assert 0 < together - alone <= pairs * (1 + 2)  # a byte for each, and a bias of two in one layer


@pytest.mark.parametrize(
    ("change", "factor"),  # 0: less
    [
        ({"quantization": "none"}, 2),
        ({"loss_head": "torch"}, 1),
        ({"loss_head": "full", "fp32_upcast": True}, 1.2),
        ({"optimizer_bytes": 8}, 1),
        ({"double_quant": False}, 1),
        ({"r": 64}, 1),
        ({"attention": "efficient"}, 1),
        ({"checkpointing": "selective"}, 1),
        ({"checkpointing": "off"}, 2),
        ({"offload": True}, 0),
    ],
)
def test_each_lever_moves_memory_the_right_way(change, factor):
    plain, changed = estimate(LLAMA_8B, 1, 2048), estimate(LLAMA_8B, 1, 2048, **change)
    assert changed.total_bytes >= factor * plain.total_bytes if factor else changed.total_bytes < plain.total_bytes
    assert estimate(LLAMA_8B, 1, 1024, **change).total_bytes < changed.total_bytes
    assert min(plain.parts.values()) > 0 and all(
        size > 0 for part, size in changed.parts.items() if part != "unpacked weights"
    )


def test_the_formula_is_instant():
    started = time.perf_counter()
    for _ in range(100):
        estimate(LLAMA_8B, 1, 2048)
    assert (time.perf_counter() - started) / 100 < 2e-3


@pytest.mark.parametrize("double_quant", [True, False])
def test_the_tensors_of_a_loaded_model_are_what_the_formula_counts(double_quant):
    """Codes, scales, and with double quantization the scales of the scales; not just what `parameters()` names."""
    import bitsandbytes as bnb

    options = {"bias": False, "compress_statistics": double_quant, "quant_type": "nf4"}
    layer = bnb.nn.Linear4bit(1024, 1024, **options).to("cpu")
    assert layer.weight.quant_state is not None
    size = sum(tensor.nbytes for tensor in loaded_tensors(layer))
    tables = 4 * (16 + (256 + 1) * double_quant)  # of the NF4 levels, and of the 8-bit scales with their mean
    assert size == nf4_bytes(1024**2, double_quant) + tables
    assert size - sum(tensor.nbytes for tensor in layer.parameters()) > 2**14

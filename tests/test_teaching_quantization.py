"""Lesson 01's helpers: bytes are counted as they are, charts show what they must, a cost is a cost."""

import io
import mmap
import time

import pytest
import torch

from helpers.memory import nf4_bytes
from notebooks.lessons.lesson_01 import (
    LINEAR,
    REST,
    SCALES,
    Cost,
    codebook_chart,
    error_chart,
    footprint_chart,
    level_shares,
    stored_bytes,
)


def texts(figure):
    return " | ".join(
        text.get_text() for axes in figure.axes for text in [*axes.texts, axes.title, *axes.get_xticklabels()]
    )


@pytest.fixture(scope="module")
def in_16_and_4_bit(tiny_model):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    load = AutoModelForCausalLM.from_pretrained
    return load(tiny_model, dtype=torch.bfloat16), load(
        tiny_model, dtype=torch.bfloat16, quantization_config=nf4, device_map={"": "cpu"}
    )


def test_bytes_of_a_16_bit_model_add_up_to_its_parameters(in_16_and_4_bit):
    model, _ = in_16_and_4_bit
    parts = stored_bytes(model)
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    assert sum(parts.values()) == 2 * sum(parameter.numel() for parameter in model.parameters()) + buffers
    assert parts[SCALES] == 0


def test_a_4_bit_model_keeps_scales_and_its_embedding(in_16_and_4_bit):
    whole, small = (stored_bytes(model) for model in in_16_and_4_bit)
    assert small[LINEAR] == whole[LINEAR] / 4 and small[REST] == whole[REST]
    per_layer = len([module for module in in_16_and_4_bit[1].modules() if type(module).__name__ == "Linear4bit"])
    rounding = per_layer * 8  # each layer has an fp32 offset and at least one whole scale of scales
    assert abs(small[LINEAR] + small[SCALES] - nf4_bytes(whole[LINEAR] // 2)) <= rounding


def test_shares_of_levels_add_up_and_go_to_the_nearest():
    levels = torch.tensor([-1.0, 0.0, 1.0])
    assert level_shares(torch.tensor([-0.9, -0.6, 0.1, 0.2, 0.4, 0.7, 1.0, -0.4]), levels).tolist() == [0.25, 0.5, 0.25]


def test_the_codebook_chart_draws_every_level_of_every_codebook():
    levels = {"NF4": torch.linspace(-1, 1, 16) ** 3, "even": torch.linspace(-1, 1, 16)}
    figure = codebook_chart(torch.rand(8, 64) * 2 - 1, levels)
    lines = [collection for axes in figure.axes for collection in axes.collections]
    assert [len(collection.get_segments()) for collection in lines] == [16, 16]
    assert len(figure.axes[1].patches) == 16
    figure.savefig(io.BytesIO(), format="png")


def test_the_error_chart_has_a_dot_for_each_layer_and_a_line_for_each_depth():
    errors = {"NF4": {f"model.layers.{depth}.{kind}": 0.1 + depth / 100 for depth in range(3) for kind in "qkv"}}
    axes = error_chart(errors, reference=0.09).axes[0]
    assert len(axes.collections[0].get_offsets()) == 9
    assert axes.lines[0].get_ydata() == pytest.approx([10, 11, 12])


def test_the_footprint_chart_says_how_much_smaller():
    figure = footprint_chart(
        {"16 bit": {LINEAR: 3 * 2**20, REST: 2**20}, "4 bit": {LINEAR: 2**20, SCALES: 0, REST: 2**20}}
    )
    assert "2 MiB (2.0 times smaller)" in texts(figure) and "4 times smaller" in texts(figure)


def test_a_cost_has_seconds_and_sees_memory_that_is_gone_again():
    size = 200 * 2**20
    # Straight from the system: an array might get memory that an earlier test freed and that the process never gave back.
    with Cost() as cost, mmap.mmap(-1, size) as block:
        block[::4096] = b"x" * (size // 4096)  # touched, so that it is really there
        time.sleep(0.1)
    assert cost.seconds >= 0.1
    assert cost.ram_peak - cost.ram_before > 0.8 * size
    assert "at the peak" in str(cost)

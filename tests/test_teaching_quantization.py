"""Lesson 01's helpers: bytes are counted as they are, charts show what they must, a cost is a cost."""

import mmap
import time
from functools import partial

import pytest
import torch

from helpers.memory import nf4_bytes
from helpers.plots import picture
from notebooks.lessons import lesson_01 as lesson


@pytest.fixture(scope="module")
def in_16_and_4_bit(tiny_model):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    load = partial(AutoModelForCausalLM.from_pretrained, tiny_model, dtype=torch.bfloat16, device_map={"": "cpu"})
    return load(), load(quantization_config=nf4)


def test_bytes_of_a_16_bit_model_add_up_to_its_parameters(in_16_and_4_bit):
    model, _ = in_16_and_4_bit
    parts = lesson.stored_bytes(model)
    assert sum(parts.values()) == 2 * sum(parameter.numel() for parameter in model.parameters())
    assert parts[lesson.SCALES] == 0 and parts[lesson.REST] > 2 * model.get_input_embeddings().weight.numel()


def test_a_4_bit_model_keeps_scales_and_its_embedding(in_16_and_4_bit):
    whole, small = (lesson.stored_bytes(model) for model in in_16_and_4_bit)
    assert small[lesson.LINEAR] == whole[lesson.LINEAR] / 4 and small[lesson.REST] == whole[lesson.REST]
    per_layer = len([module for module in in_16_and_4_bit[1].modules() if type(module).__name__ == "Linear4bit"])
    rounding = per_layer * 8  # each layer has an fp32 offset and at least one whole scale of scales
    assert abs(small[lesson.LINEAR] + small[lesson.SCALES] - nf4_bytes(whole[lesson.LINEAR] // 2)) <= rounding


def test_an_8_bit_model_keeps_a_scale_for_each_row(in_16_and_4_bit, tiny_model):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    eight = BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, quantization_config=eight, device_map={"": "cpu"})
    whole, small = lesson.stored_bytes(in_16_and_4_bit[0]), lesson.stored_bytes(model)
    assert small[lesson.LINEAR] == whole[lesson.LINEAR] / 2
    rows = [module.out_features for name, module in model.named_modules() if type(module).__name__ == "Linear8bitLt"]
    assert small[lesson.SCALES] == 4 * sum(rows) > 0


def test_the_codebook_chart_gives_each_weight_to_the_nearest_level():
    weights = torch.tensor([-0.9, -0.6, 0.1, 0.2, 0.4, 0.7, 1.0, -0.4])
    figure = lesson.codebook_chart(weights, {"three": torch.tensor([-1.0, 0.0, 1.0])})
    assert [bar.get_height() for bar in figure.axes[1].patches] == [25, 50, 25]


def test_the_codebook_chart_draws_every_level_of_every_codebook():
    levels = {"NF4": torch.linspace(-1, 1, 16) ** 3, "even": torch.linspace(-1, 1, 16)}
    figure = lesson.codebook_chart(torch.rand(8, 64) * 2 - 1, levels)
    lines = [collection for axes in figure.axes for collection in axes.collections]
    assert [len(collection.get_segments()) for collection in lines] == [16, 16]
    assert len(figure.axes[1].patches) == 16 and picture(figure).data


def test_the_error_chart_has_a_dot_for_each_layer_and_a_line_for_each_depth():
    errors = {"NF4": {f"model.layers.{depth}.{kind}": 0.1 + depth / 100 for depth in range(3) for kind in "qkv"}}
    axes = lesson.error_chart(errors, reference=0.09).axes[0]
    assert len(axes.collections[0].get_offsets()) == 9
    assert axes.lines[0].get_ydata() == pytest.approx([10, 11, 12])


def test_the_footprint_chart_says_how_much_smaller():
    parts = {
        "16 bit": {lesson.LINEAR: 3 * 2**20, lesson.REST: 2**20},
        "4 bit": {lesson.LINEAR: 2**20, lesson.SCALES: 0, lesson.REST: 2**20},
    }
    said = [text.get_text() for text in lesson.footprint_chart(parts).axes[0].texts]
    assert said == ["4 MiB", "2 MiB (2.0 times smaller)", ' "4 times smaller"']


def test_a_cost_has_seconds_and_sees_memory_that_is_gone_again():
    size = 200 * 2**20
    # Straight from the system: an array might get memory that an earlier test freed and that the process never gave back.
    with lesson.Cost() as cost, mmap.mmap(-1, size) as block:
        block[::4096] = b"x" * (size // 4096)  # touched, so that it is really there
        time.sleep(0.1)
    assert cost.seconds >= 0.1
    assert max(cost.ram) - cost.ram[0] > 0.8 * size
    assert "at the peak" in str(cost)

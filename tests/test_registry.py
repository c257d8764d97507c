import re
from dataclasses import replace

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, LlamaConfig

from helpers.registry import CATALOG, ModelShape, resolve

ROWS = pytest.mark.parametrize("row", CATALOG.values(), ids=lambda row: row.short_name)


@pytest.mark.parametrize(
    ("name", "rank", "published"),
    [  # all-linear adapters, from the model cards and training logs of Unsloth and axolotl
        ("Llama-3.2-1B-Instruct", 16, 11_272_192),
        ("Llama-3.2-3B-Instruct", 16, 24_313_856),
        ("Qwen3-4B", 16, 33_030_144),
        ("Qwen2.5-7B-Instruct", 16, 40_370_176),
        ("Llama-3.1-8B-Instruct", 16, 41_943_040),
        ("Qwen3-14B", 16, 64_225_280),
        ("Qwen3-14B", 32, 128_450_560),
    ],
)
def test_lora_parameters_equal_the_published_counts(name, rank, published):
    assert CATALOG[name].shape.lora_parameters(rank) == published


@ROWS
def test_parameters_equal_those_of_the_real_model_class(row):
    """The formula's counts against transformers' own class, built without memory on the meta device."""
    import torch

    shape = replace(row.shape, num_hidden_layers=2)
    values = shape.to_config()
    config = AutoConfig.for_model(values.pop("model_type"), **values | {"pad_token_id": 0})
    assert ModelShape.from_config(config) == shape
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in model.parameters()) == shape.parameters()


def test_the_menu_begins_with_the_smallest_model_and_names_become_hub_ids():
    sizes = [row.shape.parameters() for row in CATALOG.values()]
    assert sizes == sorted(sizes)
    assert (resolve("Qwen3-4B"), resolve("someone/else")) == ("Qwen/Qwen3-4B", "someone/else")


@ROWS
def test_each_row_says_where_shape_license_and_gating_come_from_or_that_nobody_looked(row):
    for said in (row.source, row.license_source, row.gating_source):
        assert said == "unverified" or re.search(
            r"github\.com/|https://|recorded|published|GGUF|wheel|card|package index", said
        ), said
    assert (row.license == "unverified") == (row.license_source == "unverified")


def test_an_unknown_family_is_not_guessed_and_unknown_target_modules_are_named():
    with pytest.raises(ValueError, match="not modeled"):
        ModelShape.from_config(BertConfig())
    shape = ModelShape.from_config(LlamaConfig())
    with pytest.raises(ValueError, match="query"):
        shape.lora_parameters(8, ["query"])

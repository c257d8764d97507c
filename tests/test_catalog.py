import re

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, LlamaConfig

from helpers.registry import CATALOG, ModelShape, resolve

# Published by the projects that trained them (all-linear adapters); see the model cards and training logs of Unsloth and axolotl.
PUBLISHED_LORA_COUNTS = [
    ("Llama-3.2-1B-Instruct", 16, 11_272_192),
    ("Llama-3.2-3B-Instruct", 16, 24_313_856),
    ("Qwen3-4B", 16, 33_030_144),
    ("Qwen2.5-7B-Instruct", 16, 40_370_176),
    ("Llama-3.1-8B-Instruct", 16, 41_943_040),
    ("Qwen3-14B", 16, 64_225_280),
    ("Qwen3-14B", 32, 128_450_560),
]


@pytest.mark.parametrize(("name", "rank", "published"), PUBLISHED_LORA_COUNTS)
def test_lora_parameters_equal_the_published_counts(name, rank, published):
    assert CATALOG[name].shape.lora_parameters(rank) == published


@pytest.mark.parametrize("row", CATALOG.values(), ids=lambda row: row.short_name)
def test_parameters_equal_those_of_the_real_model_class(row):
    """The formula's counts against transformers' own class, built without memory on the meta device."""
    import torch

    shape = row.shape
    config = AutoConfig.for_model(
        shape.model_type,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=2,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab_size,
        tie_word_embeddings=shape.tie_word_embeddings,
        pad_token_id=0,
    )
    assert ModelShape.from_config(config).linear_layers() == shape.linear_layers()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    from dataclasses import replace

    assert sum(p.numel() for p in model.parameters()) == replace(shape, num_hidden_layers=2).parameters()


def test_a_short_name_becomes_its_hub_id_and_anything_else_stays():
    assert resolve("Qwen3-4B") == "Qwen/Qwen3-4B"
    assert resolve("someone/else") == "someone/else"


@pytest.mark.parametrize("row", CATALOG.values(), ids=lambda row: row.short_name)
def test_each_row_says_where_shape_license_and_gating_come_from_or_that_nobody_looked(row):
    for said in (row.source, row.license_source, row.gating_source):
        assert said == "unverified" or re.search(
            r"github\.com/|https://|recorded|published|GGUF|wheel|card|package index", said
        ), said
    assert (row.license == "unverified") == (row.license_source == "unverified")


def test_an_unknown_family_is_not_guessed():
    with pytest.raises(ValueError, match="not modeled"):
        ModelShape.from_config(BertConfig())


def test_unknown_target_modules_are_named():
    shape = ModelShape.from_config(LlamaConfig())
    with pytest.raises(ValueError, match="query"):
        shape.lora_parameters(8, ["query"])

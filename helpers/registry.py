"""The menu of base models: what each is called, how big it is, whether it is gated, and its shape.

    CATALOG["Qwen2.5-1.5B-Instruct"].shape.parameters()
    ModelShape.from_config(AutoConfig.from_pretrained(any_id))      # a model that is not on the menu

Shapes are the numbers of each model's `config.json`. They were entered by hand from the published configurations and are
checked where a published total exists (LoRA parameter counts, recorded runs). Each row says where its shape, its license and its
gating come from, or `unverified`: read the model's own card before you publish, because owners change both.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.config import ConfigError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

BUNDLED_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"  # what needs no Hub: helpers.bundled

# transformers' model_type -> what is special about its blocks, as far as memory and precision are concerned
FAMILIES: dict[str, frozenset[str]] = {
    "llama": frozenset(),
    "mistral": frozenset(),
    "smollm3": frozenset(),
    "granite": frozenset(),
    "gemma": frozenset(),
    "qwen2": frozenset({"qkv bias"}),
    "qwen3": frozenset({"query and key norms"}),
    "gemma2": frozenset({"norms after attention and MLP", "eager attention only"}),
    "gemma3_text": frozenset({"norms after attention and MLP", "query and key norms"}),
    "phi3": frozenset({"fused matrices"}),
}


@dataclass(frozen=True)
class ModelShape:
    """The sizes that decide memory, with the names that `config.json` uses."""

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool
    max_position_embeddings: int = 8192

    @classmethod
    def from_config(cls, config: Any) -> ModelShape:
        """From a `transformers` configuration.

        Raises:
            ValueError: the model type is not one that the memory formula models.
        """
        if config.model_type not in FAMILIES:
            raise ValueError(
                f"model type {config.model_type!r} is not modeled; modeled are {', '.join(sorted(FAMILIES))}. "
                "Training may still work, but its memory cannot be predicted."
            )
        heads = config.num_attention_heads
        return cls(
            model_type=config.model_type,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=heads,
            num_key_value_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            vocab_size=config.vocab_size,
            tie_word_embeddings=bool(config.tie_word_embeddings),
            max_position_embeddings=config.max_position_embeddings,
        )

    def to_config(self) -> dict[str, Any]:
        """The same as plain values for `AutoConfig.for_model`, for a model that is built without its files."""
        return asdict(self) | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

    @property
    def query_size(self) -> int:
        return self.num_attention_heads * self.head_dim

    @property
    def key_value_size(self) -> int:
        return self.num_key_value_heads * self.head_dim

    def has(self, trait: str) -> bool:
        """Is this special about the family? The traits are those of `FAMILIES`."""
        return trait in FAMILIES[self.model_type]

    def linear_layers(self) -> dict[str, tuple[int, int]]:
        """Name -> (in features, out features) of the linear layers in one transformer block: the ones that get quantized."""
        h, i, q, kv = self.hidden_size, self.intermediate_size, self.query_size, self.key_value_size
        if self.has("fused matrices"):
            return {"qkv_proj": (h, q + 2 * kv), "o_proj": (q, h), "gate_up_proj": (h, 2 * i), "down_proj": (i, h)}
        attention = {"q_proj": (h, q), "k_proj": (h, kv), "v_proj": (h, kv), "o_proj": (q, h)}
        return attention | {"gate_proj": (h, i), "up_proj": (h, i), "down_proj": (i, h)}

    def linear_parameters(self) -> int:
        """Weights in all quantizable linear layers of the model (without biases)."""
        return self.num_hidden_layers * sum(rows * columns for rows, columns in self.linear_layers().values())

    def other_parameters(self) -> int:
        """What stays in 16 bit: embedding, output head if it is not the same matrix, norms, biases."""
        h = self.hidden_size
        per_layer = (4 if self.has("norms after attention and MLP") else 2) * h
        per_layer += 2 * self.head_dim if self.has("query and key norms") else 0
        per_layer += self.query_size + 2 * self.key_value_size if self.has("qkv bias") else 0
        embeddings = self.vocab_size * h * (1 if self.tie_word_embeddings else 2)
        return embeddings + self.num_hidden_layers * per_layer + h

    def parameters(self) -> int:
        """All parameters of the model."""
        return self.linear_parameters() + self.other_parameters()

    def lora_parameters(self, r: int, target_modules: str | list[str] = "all-linear") -> int:
        """Trainable parameters of a LoRA adapter: r x (in + out) for each adapted layer (arXiv 2106.09685)."""
        layers = self.linear_layers()
        names = layers if target_modules == "all-linear" else target_modules
        unknown = [name for name in names if name not in layers]
        if unknown:
            raise ValueError(f"{self.model_type} has no layers named {unknown}; it has {list(layers)}.")
        return self.num_hidden_layers * r * sum(sum(layers[name]) for name in names)


@dataclass(frozen=True)
class BaseModel:
    """One row of the menu."""

    id: str
    shape: ModelShape
    source: str = "unverified"
    """Where the shape comes from."""
    license: str = "unverified"
    license_source: str = "unverified"
    gated: bool = False
    """Must somebody accept the license on the Hub before the files can be fetched?"""
    gating_source: str = "unverified"
    prequantized: str = ""
    """A repository with the same weights already in NF4, a third of the download: only for ungated models above 7 GB."""

    @property
    def short_name(self) -> str:
        return self.id.split("/")[-1]


_LLAMA = ModelShape(
    "llama", 2048, 8192, 16, 32, 8, 64, 128256, True, 131072
)  # Llama-3.2-1B; others are given as differences
_QWEN2 = ModelShape("qwen2", 1536, 8960, 28, 12, 2, 128, 151936, True, 32768)  # Qwen2.5-1.5B
_QWEN3 = ModelShape("qwen3", 2048, 6144, 28, 16, 8, 128, 151936, True, 40960)  # Qwen3-1.7B
_SMOL = ModelShape("llama", 576, 1536, 30, 9, 3, 64, 49152, True, 8192)  # SmolLM2-135M


# Where a license or its gating was read. (The Hub's own model cards could not be asked when this was written.)
_QWEN25_LICENSE = {
    "license": "Apache-2.0",
    "license_source": "README of github.com/QwenLM/Qwen2.5: all sizes but 3B and 72B",
}
_QWEN3_LICENSE = {
    "license": "Apache-2.0",
    "license_source": "README of github.com/QwenLM/Qwen3: all open-weight models",
}
_META = "README of github.com/meta-llama/llama-models"


def _llama_license(version: str) -> dict[str, Any]:
    return {
        "license": f"Llama {version} Community License",
        "license_source": _META,
        "gated": True,
        "gating_source": _META,
    }


def _rows() -> list[BaseModel]:
    shape = replace
    recorded, counted = "recorded T4 runs", "published LoRA parameter count"
    return [
        BaseModel(
            BUNDLED_MODEL,
            _SMOL,
            "its GGUF file",
            "Apache-2.0",
            "its GGUF file",
            gating_source="comes from the package index",
        ),
        BaseModel(
            "HuggingFaceTB/SmolLM2-360M-Instruct",
            shape(
                _SMOL,
                hidden_size=960,
                intermediate_size=2560,
                num_hidden_layers=32,
                num_attention_heads=15,
                num_key_value_heads=5,
            ),
        ),
        BaseModel(
            "Qwen/Qwen2.5-0.5B-Instruct",
            shape(
                _QWEN2,
                hidden_size=896,
                intermediate_size=4864,
                num_hidden_layers=24,
                num_attention_heads=14,
                head_dim=64,
            ),
            **_QWEN25_LICENSE,
        ),
        BaseModel(
            "TinyLlama/TinyLlama-1.1B-Chat-v1.0", ModelShape("llama", 2048, 5632, 22, 32, 4, 64, 32000, False, 2048)
        ),
        BaseModel("meta-llama/Llama-3.2-1B-Instruct", _LLAMA, counted, **_llama_license("3.2")),
        BaseModel("Qwen/Qwen2.5-1.5B-Instruct", _QWEN2, recorded, **_QWEN25_LICENSE),
        BaseModel(
            "HuggingFaceTB/SmolLM2-1.7B-Instruct",
            ModelShape("llama", 2048, 8192, 24, 32, 32, 64, 49152, True, 8192),
            recorded,
        ),
        BaseModel("Qwen/Qwen3-1.7B", _QWEN3, **_QWEN3_LICENSE),
        BaseModel(
            "google/gemma-2-2b-it",
            ModelShape("gemma2", 2304, 9216, 26, 8, 4, 256, 256000, True, 8192),
            license="Gemma terms of use",
            license_source="https://ai.google.dev/gemma/terms",
            gated=True,
            gating_source="notice above the model cards of google/gemma",
        ),
        BaseModel("HuggingFaceTB/SmolLM3-3B", ModelShape("smollm3", 2048, 11008, 36, 16, 4, 128, 128256, True, 65536)),
        BaseModel(
            "meta-llama/Llama-3.2-3B-Instruct",
            shape(_LLAMA, hidden_size=3072, num_hidden_layers=28, num_attention_heads=24, head_dim=128),
            counted,
            **_llama_license("3.2"),
        ),
        BaseModel(
            "microsoft/Phi-3.5-mini-instruct", ModelShape("phi3", 3072, 8192, 32, 32, 32, 96, 32064, False, 131072)
        ),
        BaseModel(
            "Qwen/Qwen3-4B",
            shape(_QWEN3, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32),
            counted,
            **_QWEN3_LICENSE,
        ),
        BaseModel(
            "mistralai/Mistral-7B-Instruct-v0.3",
            ModelShape("mistral", 4096, 14336, 32, 32, 8, 128, 32768, False, 32768),
            license="Apache-2.0",
            license_source="its model card, as copies of it on the Hub repeat it",
            prequantized="unsloth/mistral-7b-instruct-v0.3-bnb-4bit",
        ),
        BaseModel(
            "Qwen/Qwen2.5-7B-Instruct",
            ModelShape("qwen2", 3584, 18944, 28, 28, 4, 128, 152064, False, 32768),
            f"{counted}, {recorded}",
            **_QWEN25_LICENSE,
            prequantized="unsloth/Qwen2.5-7B-Instruct-bnb-4bit",
        ),
        BaseModel(
            "meta-llama/Llama-3.1-8B-Instruct",
            shape(
                _LLAMA,
                hidden_size=4096,
                intermediate_size=14336,
                num_hidden_layers=32,
                head_dim=128,
                tie_word_embeddings=False,
            ),
            counted,
            **_llama_license("3.1"),
        ),
        BaseModel(
            "Qwen/Qwen3-8B",
            shape(
                _QWEN3,
                hidden_size=4096,
                intermediate_size=12288,
                num_hidden_layers=36,
                num_attention_heads=32,
                tie_word_embeddings=False,
            ),
            **_QWEN3_LICENSE,
        ),
        BaseModel(
            "meta-llama/Llama-2-13b-chat-hf",
            ModelShape("llama", 5120, 13824, 40, 40, 40, 128, 32000, False, 4096),
            **_llama_license("2"),
        ),
        BaseModel(
            "Qwen/Qwen3-14B",
            shape(
                _QWEN3,
                hidden_size=5120,
                intermediate_size=17408,
                num_hidden_layers=40,
                num_attention_heads=40,
                tie_word_embeddings=False,
            ),
            counted,
            **_QWEN3_LICENSE,
            prequantized="unsloth/Qwen3-14B-bnb-4bit",
        ),
    ]


CATALOG: dict[str, BaseModel] = {row.short_name: row for row in _rows()}
"""Short name -> row, smallest first."""


def resolve(model: str) -> str:
    """The Hub id or folder behind a name: a short name from the menu becomes its Hub id, anything else stays as it is."""
    return CATALOG[model].id if model in CATALOG else model


def find_shape(model: str) -> ModelShape | None:
    """Shape of a menu row, a local folder or a Hub id (reads only config.json); None if it is unknown or not modeled."""
    for row in CATALOG.values():
        if model in (row.id, row.short_name):
            return row.shape
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = _read_config(model)
    if config is None:
        return None
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or config.is_encoder_decoder:
        raise ConfigError(
            f"{model} is a {config.model_type} model, not a causal language model; choose one that continues text, "
            "such as those on the menu."
        )
    try:
        return ModelShape.from_config(config)
    except ValueError:
        return None


def find_model_type(model: str) -> str:
    """The `model_type` in the config.json of a local folder or a Hub id, modeled or not; empty if it cannot be read."""
    return getattr(_read_config(model), "model_type", "")


def _read_config(model: str) -> PretrainedConfig | None:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(Path(model) if Path(model).is_dir() else model)
    except (ValueError, OSError):
        return None

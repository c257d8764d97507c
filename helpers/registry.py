"""The menu of base models: what each is called, how big it is, whether it is gated, and its shape.

    CATALOG["Qwen2.5-1.5B-Instruct"].shape.parameters()
    ModelShape.from_config(AutoConfig.from_pretrained(any_id))      # a model that is not on the menu

The rows are in models.csv. Shapes are the numbers of each model's `config.json`, entered by hand from the published configurations and
checked where a published total exists (LoRA parameter counts, recorded runs). Each row says where its shape, its license and its
gating come from, or `unverified`: read the model's own card before you publish, because owners change both.
"""

from __future__ import annotations

import csv
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.config import ConfigError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

MENU = Path(__file__).with_name("models.csv")
BUNDLED_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"  # what needs no Hub: helpers.weights

OWN_CODE = (
    "brings Python code of its own, which is never run here: choose a model that transformers knows, as on the menu."
)

# transformers' model_type -> what is special about its blocks, as far as memory and precision are concerned
FAMILIES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("llama", "mistral", "smollm3", "granite", "gemma"), ()),
    "qwen2": ("qkv bias",),
    "qwen3": ("query and key norms",),
    "gemma2": ("norms after attention and MLP", "eager attention only"),
    "gemma3_text": ("norms after attention and MLP", "query and key norms"),
    "phi3": ("fused matrices",),
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
        sizes: dict[str, Any] = {field.name: getattr(config, field.name, None) for field in fields(cls)}
        heads = config.num_attention_heads
        sizes["num_key_value_heads"] = sizes["num_key_value_heads"] or heads
        sizes["head_dim"] = sizes["head_dim"] or config.hidden_size // heads
        sizes["tie_word_embeddings"] = bool(sizes["tie_word_embeddings"])
        return cls(**sizes)

    def to_config(self) -> dict[str, Any]:
        """The same as plain values for `AutoConfig.for_model`, for a model that is built without its files."""
        return asdict(self) | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

    @property
    def query_size(self) -> int:
        """Numbers per token in the queries of one layer, all heads together."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_value_size(self) -> int:
        """Numbers per token in the keys of one layer, and as many in its values."""
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

    def adapted_layers(self, target_modules: str | list[str] = "all-linear") -> dict[str, tuple[int, int]]:
        """Those of `linear_layers` that get an adapter.

        Raises:
            ValueError: the model has no layer of such a name.
        """
        layers = self.linear_layers()
        names = list(layers) if target_modules == "all-linear" else target_modules
        unknown = [name for name in names if name not in layers]
        if unknown:
            raise ValueError(f"{self.model_type} has no layers named {unknown}; it has {list(layers)}.")
        return {name: layers[name] for name in names}

    def lora_parameters(self, r: int, target_modules: str | list[str] = "all-linear") -> int:
        """Trainable parameters of a LoRA adapter: r x (in + out) for each adapted layer (arXiv 2106.09685)."""
        return self.num_hidden_layers * r * sum(map(sum, self.adapted_layers(target_modules).values()))


@dataclass(frozen=True)
class BaseModel:
    """One row of the menu. The sources say where something was read, or that nobody looked."""

    id: str
    shape: ModelShape
    source: str = "unverified"
    license: str = "unverified"
    license_source: str = "unverified"
    gated: bool = False
    """Must somebody accept the license on the Hub before the files can be fetched?"""
    gating_source: str = "unverified"

    @property
    def short_name(self) -> str:
        """The id without its owner."""
        return self.id.split("/")[-1]


def _read_menu() -> dict[str, BaseModel]:
    menu = {}
    with MENU.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            cells = {name: _value(cell) for name, cell in row.items()}
            shape = ModelShape(**{field.name: cells.pop(field.name) for field in fields(ModelShape)})
            model = BaseModel(shape=shape, **cells)
            menu[model.short_name] = model
    return menu


def _value(cell: str) -> Any:
    return cell == "yes" if cell in ("yes", "no") else int(cell) if cell.isdigit() else cell


CATALOG: dict[str, BaseModel] = _read_menu()
"""Short name -> row, smallest first."""


def resolve(model: str) -> str:
    """The Hub id or folder behind a name: a short name from the menu becomes its Hub id, anything else stays as it is."""
    return CATALOG[model].id if model in CATALOG else model


def find_row(model: str) -> BaseModel | None:
    """The menu's row of this Hub id or short name; None if it is not on the menu."""
    return next((row for row in CATALOG.values() if model in (row.id, row.short_name)), None)


def find_shape(model: str) -> ModelShape | None:
    """Shape of a menu row, a local folder or a Hub id (reads only config.json); None if it is unknown or not modeled."""
    if row := find_row(model):
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
    return ModelShape.from_config(config) if config.model_type in FAMILIES else None


def find_model_type(model: str) -> str:
    """The `model_type` in the config.json of a local folder or a Hub id, modeled or not; empty if it cannot be read."""
    return getattr(_read_config(model), "model_type", "")


def _read_config(model: str) -> PretrainedConfig | None:
    from transformers import AutoConfig

    try:
        place = Path(model) if Path(model).is_dir() else model
        return AutoConfig.from_pretrained(place, trust_remote_code=False)
    except (ValueError, OSError) as error:
        if "trust_remote_code" in str(error):
            raise ConfigError(f"{model} {OWN_CODE}") from None
        return None

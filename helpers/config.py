"""The one dataclass that a learner edits.

    config = TrainConfig(r=32, learning_rate=1e-4)
    config.max_length = 1024        # change a field whenever you like: nothing happens until you train
    config.check()                  # says what is wrong and how to mend it

Fields have the names that `LoraConfig` and `SFTConfig` use, so what you learn here you can use anywhere.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


class ConfigError(ValueError):
    """A setting that cannot work. The message names the setting, the reason and the fix."""


@dataclass
class TrainConfig:
    """Everything that decides what a training run does. Memory settings (micro-batch, checkpointing) are the planner's."""

    name: str = "run"
    """Name of the run folder: `runs/<name>`."""
    model: str = "auto"
    """A name from the menu (`helpers.registry`), a local folder, any Hub id, or "auto": the best fit for this machine."""
    data: str = "data_samples/customer_support.jsonl"
    """The file with your examples."""
    validation_share: float = 0.15
    """Part of the examples held out and never trained on. 0.10 to 0.20 is usual."""
    max_eval_samples: int = 48
    """At most this many held-out examples are used for each evaluation during training, so that it stays short."""
    num_evaluations: int = 8
    """How often the validation loss is measured during training (and once before the first step)."""
    early_stopping_patience: int = 3
    """Stop after so many measurements in a row without a new best validation loss; 0 trains to the end."""

    quantization: str = "nf4"
    """"nf4": 4-bit base weights (QLoRA). "none": 16-bit base weights (plain LoRA)."""
    r: int = 16
    """Rank of the LoRA matrices: how much the adapter can learn. Nearly free in memory."""
    lora_alpha: int = 32
    """The adapter's output is multiplied by lora_alpha / r."""
    lora_dropout: float = 0.0
    """Share of the adapter's inputs set to zero while training. 0.05 helps on very small data; it costs memory and time."""
    target_modules: str | list[str] = "all-linear"
    """Which layers get an adapter: "all-linear", or names such as ["q_proj", "v_proj"]."""

    max_length: int = 512
    """Longest example in tokens (prompt and answer together)."""
    effective_batch_size: int = 8
    """Examples per optimizer step = micro-batch x gradient accumulation. The planner chooses the two factors."""
    micro_batch_size: int = 0
    """Examples that go through the model at once; 0 lets the planner choose. Must divide effective_batch_size."""
    gradient_checkpointing: str = "auto"
    """Compute activations twice instead of keeping them: "auto" (only if memory needs it), "on" or "off"."""
    num_train_epochs: float = 1.0
    """How often each training example is seen."""
    max_steps: int = -1
    """Stop after this many optimizer steps; -1 means: go by epochs."""
    learning_rate: float = 2e-4
    """Step size. 1e-4 to 5e-4 is usual for LoRA."""
    warmup_ratio: float = 0.1
    """Part of the steps during which the learning rate rises from zero."""
    lr_scheduler_type: str = "cosine"
    """How the learning rate falls afterwards: "cosine", "linear" or "constant_with_warmup"."""
    seed: int = 42
    """Same seed, same data, same settings: same run."""

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Raise `ConfigError` with one line per setting that cannot work."""
        at_least_one = ["r", "lora_alpha", "max_length", "effective_batch_size", "max_eval_samples", "num_evaluations"]
        rules = [
            (
                not self.name or any(c in self.name for c in '/\\:*?"<>|') or self.name.startswith("."),
                f"name={self.name!r} becomes a folder name: use letters, digits, - and _.",
            ),
            (
                not 0 < self.validation_share < 0.5,
                f"validation_share={self.validation_share} must lie between 0 and 0.5; 0.15 is a good start.",
            ),
            (self.quantization not in ("nf4", "none"), f'quantization={self.quantization!r} must be "nf4" or "none".'),
            (
                self.gradient_checkpointing not in ("auto", "on", "off"),
                f'gradient_checkpointing={self.gradient_checkpointing!r} must be "auto", "on" or "off".',
            ),
            (not 0 <= self.lora_dropout < 1, f"lora_dropout={self.lora_dropout} must be at least 0 and below 1."),
            (
                self.learning_rate <= 0,
                f"learning_rate={self.learning_rate} must be above 0; 2e-4 is a good start for LoRA.",
            ),
            (not 0 <= self.warmup_ratio < 1, f"warmup_ratio={self.warmup_ratio} must be at least 0 and below 1."),
            (
                self.early_stopping_patience < 0,
                f"early_stopping_patience={self.early_stopping_patience} must be a number of evaluations, or 0 to switch it off.",
            ),
            (self.num_train_epochs <= 0, f"num_train_epochs={self.num_train_epochs} must be above 0; 1 to 3 is usual."),
            (
                self.max_steps == 0 or self.max_steps < -1,
                f"max_steps={self.max_steps} must be a number of steps, or -1 to go by epochs.",
            ),
            (
                self.micro_batch_size < 0
                or (self.micro_batch_size > 0 and self.effective_batch_size % self.micro_batch_size != 0),
                f"effective_batch_size={self.effective_batch_size} is not divisible by micro_batch_size={self.micro_batch_size}: "
                "choose a divisor, or 0 to let the planner choose.",
            ),
            *[
                (getattr(self, field) < 1, f"{field}={getattr(self, field)} must be at least 1.")
                for field in at_least_one
            ],
        ]
        problems = [message for wrong, message in rules if wrong]
        if problems:
            raise ConfigError("\n".join(problems))

    def to_dict(self) -> dict[str, Any]:
        """All settings as plain values, as they are written to the run folder."""
        return asdict(self)

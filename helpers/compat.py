"""What this kit changes in other libraries, all of it: each change in one function, with its reason.

Names that a library keeps to itself may be gone in its next version. Each is looked for before it is used, and what happens without it is
said beside it: it may be slower, never wrong.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import bitsandbytes as bnb
import torch
import trl.models
from transformers import PreTrainedModel, TrainingArguments
from transformers.integrations import sdpa_attention
from trl.kernels import chunked_logprob as trl_kernels
from trl.trainer import utils as trl_utils

# ------------------------------------------------------------------------------------------------- checkpointing


def set_checkpointing(model: Any, mode: str, *, reentrant: bool = False) -> None:
    """Switch a model, or the model inside a PeftModel, to exactly this mode, whatever was set before.

    "off" keeps all activations, "on" computes each layer again in the backward pass (`reentrant` in PyTorch's older way), "selective" does
    so too but keeps attention's output. Without TRL's function, "selective" becomes "on", which needs less memory.
    """
    base: PreTrainedModel = getattr(model, "get_base_model", lambda: model)()
    for owner in (model, base):  # TRL lays a method over the instance, which would make every later "on" selective too
        vars(owner).pop("gradient_checkpointing_enable", None)
    # transformers up to 5.15 calls it gradient checkpointing, later activation checkpointing
    kind = "activation" if hasattr(base, "activation_checkpointing_enable") else "gradient"
    getattr(base, f"{kind}_checkpointing_disable")()
    base.disable_input_require_grads()
    if mode == "off":
        return
    select = getattr(trl.models, "enable_selective_activation_checkpointing", None)
    if mode == "selective" and select is not None:
        select(base)
    getattr(base, f"{kind}_checkpointing_enable")({"use_reentrant": reentrant})
    base.enable_input_require_grads()  # the embedding is frozen, and a layer computed again needs an input with a gradient


def get_checkpointing(model: Any) -> Literal["off", "selective", "on"]:
    """The mode that the model's layers are in: read from the function that they will call, not from what was asked for."""
    layers = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    calls = [getattr(layer, "_gradient_checkpointing_func", None) for layer in layers]
    arguments = [getattr(call, "keywords", {}) for call in calls if call is not None]
    if not arguments:
        return "off"
    return "selective" if all("context_fn" in each for each in arguments) else "on"


# -------------------------------------------------------------------------------------------------- loss head

TRL_NAMES = {
    trl_utils: ("_CHUNKED_LOGPROB_CHUNK_SIZE", "_use_triton", "add_fused_lm_head"),
    trl_kernels: ("_use_triton", "_forward_tile", "_backward_tile", "_addmm_fp32", "ChunkedLogProbFunction"),
}


def missing_names() -> list[str]:
    """What this kit must find in TRL to know how its loss head works, and does not. Then all logits are computed at once instead."""
    names = [(module, name) for module, names in TRL_NAMES.items() for name in names]
    return [f"{module.__name__}.{name}" for module, name in names if not hasattr(module, name)]


def use_loss_head(head: str, tile: int) -> None:
    """Have TRL's loss head run as planned, for as long as this process lives: which kernels, how many vocabulary entries at a time.

    Without Triton, TRL 1.16 projects every position to the whole vocabulary, prompts included, and masks afterwards. On two
    CPU cores, a step of the bundled model is a fifth faster and needs a gigabyte less without that; the loss is the same.
    """
    if head == "full" or missing_names():
        return  # the trainer then computes all logits itself
    trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE = tile
    trl_utils._use_triton = lambda device: True  # means there: only positions that are trained
    trl_kernels._use_triton = lambda device: head == "triton" and device.type == "cuda"


def working_head() -> str:
    """What TRL's loss head can do in this process: "triton", "torch", or "full" if it is not built as this kit knows it."""
    if missing_names():
        return "full"
    return "triton" if triton_works() else "torch"


@functools.lru_cache(maxsize=1)
def triton_works() -> bool:
    """Do the Triton kernels give, on one small tile, what the torch path gives, forward and backward? Tried once for each process."""
    before, answers = trl_kernels._use_triton, []
    try:
        numbers = torch.Generator("cuda").manual_seed(0)  # our own, so that the run's random numbers stay as they are
        hidden = torch.randn(4, 64, device="cuda", generator=numbers)
        weight = torch.randn(128, 64, device="cuda", generator=numbers)
        targets = torch.tensor([1, 2, 3, 127], device="cuda")
        for choice in (True, False):
            trl_kernels._use_triton = lambda device, choice=choice: choice
            leaf = hidden.clone().requires_grad_()
            log_probs = trl_kernels.ChunkedLogProbFunction.apply(leaf, weight, None, targets, 1.0, 128)[0]
            log_probs.sum().backward()
            answers.append((log_probs.detach(), leaf.grad))
        return all(torch.allclose(one, other, atol=1e-3) for one, other in zip(*answers))
    except Exception:  # no card, compiler, driver or instruction: the torch path works without it
        return False
    finally:
        trl_kernels._use_triton = before


# ------------------------------------------------------------------------------------- attention, weights, trainer

_SHARED_AS_THEY_ARE = getattr(sdpa_attention, "use_gqa_in_sdpa", None)


def repeat_shared_keys(repeat: bool) -> None:
    """Keep PyTorch's attention off its slow math kernel where it has no flash attention (transformers#48633).

    transformers hands shared keys and values (grouped-query attention) to PyTorch as they are when there is no mask, which the
    memory-efficient kernel refuses; repeated beforehand, it takes them. Without transformers' function, they are repeated anyway.
    """
    if _SHARED_AS_THEY_ARE is not None:
        sdpa_attention.use_gqa_in_sdpa = (lambda *args, **kwargs: False) if repeat else _SHARED_AS_THEY_ARE


def keep_weights_trainable(model: torch.nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights for inference, which silently ruins training on some CPUs.

    On CPUs with AVX512-BF16, the first forward pass in eval mode repacks each weight, and the backward pass through a repacked
    weight is wrong: cosine 0.03 with the right gradient, with a loss that looks normal (measured with bitsandbytes 0.50.2).
    This can go when tests/test_models.py passes without it on such a CPU.
    """
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def use_one_card(arguments: TrainingArguments) -> None:
    """Train on the first card, however many are visible: Trainer would split a 4-bit model over all (two on Kaggle), and TRL refuses.

    The model is loaded onto that card (`device_map={"": 0}`). Without the name, TRL's own message says what to do.
    """
    if arguments.n_gpu > 1 and hasattr(arguments, "_n_gpu"):
        arguments._n_gpu = 1


def forget_foreign_scaler(trainer: Any) -> None:
    """Let a run of an fp16 card go on where there is no gradient scaler: its state is of no use there, and loading it fails."""
    if trainer.accelerator.scaler is None and hasattr(trainer, "_load_scaler"):
        trainer._load_scaler = lambda checkpoint: None


def get_counts(trainer: Any, mode: str = "train") -> tuple[int, dict[str, int]]:
    """What TRL has counted so far: trained tokens, and how many values each metric of `mode` has. Zero where it keeps them elsewhere."""
    metrics = getattr(trainer, "_metrics", {}).get(mode, {})
    return getattr(trainer, "_total_train_tokens", 0), {name: len(values) for name, values in metrics.items()}


def set_counts(trainer: Any, counts: tuple[int, dict[str, int]], mode: str = "train") -> None:
    """Go back to what `get_counts` gave, because a step is done again or a run goes on. Only what is logged depends on it."""
    trainer._total_train_tokens, lengths = counts
    for name, values in getattr(trainer, "_metrics", {}).get(mode, {}).items():
        del values[lengths.get(name, 0) :]


def count_once(trainer: Any, counts: tuple[int, dict[str, int]], tokens: list[int], mode: str = "train") -> None:
    """Have a step, begun at `counts`, count as one value of each metric: the mean of its pieces, which have so many trained tokens."""
    for name, values in getattr(trainer, "_metrics", {}).get(mode, {}).items():
        new = values[counts[1].get(name, 0) :]
        if name != "num_tokens" and len(new) == len(tokens):  # that one is a running total
            values[-len(new) :] = [sum(value * count for value, count in zip(new, tokens)) / max(1, sum(tokens))]

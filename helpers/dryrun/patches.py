"""What libraries are made to do on the meta device, so that memory is taken as on the card: attention, loss head, arithmetic.

Only the worker's process may import this: it replaces functions of torch, transformers and TRL.
"""

from __future__ import annotations

from typing import Any

import torch
import trl.kernels.chunked_logprob as trl_kernels
import trl.trainer.utils as trl_utils
from torch import Tensor, nn
from torch.nn import functional
from transformers import masking_utils
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from helpers.compat import missing_names
from helpers.dryrun import Step
from helpers.dryrun.tracker import MemoryTracker

aten = torch.ops.aten
REPLACED = {
    functional: ("linear", "softmax"),
    torch: ("is_autocast_enabled",),
    trl_kernels: ("_forward_tile", "_backward_tile", "_addmm_fp32", "_use_triton"),
    trl_utils: ("_use_triton", "_CHUNKED_LOGPROB_CHUNK_SIZE"),
    masking_utils: ("_ignore_causal_mask_sdpa",),
}
ORIGINALS = [
    (module, name, getattr(module, name))
    for module, names in REPLACED.items()
    for name in names
    if hasattr(module, name)
]
linear, softmax = functional.linear, functional.softmax
# transformers leaves the mask out where no token is padded. On the meta device that question has no answer, so it is answered here.
CAN_FORCE_MASK = hasattr(masking_utils, "_ignore_causal_mask_sdpa")


def patch(step: Step, tracker: MemoryTracker) -> Autocast:
    """Undo what the last step needed, and do what this one needs."""
    for module, name, original in ORIGINALS:
        setattr(module, name, original)
    choose_attention(step)
    choose_loss_head(step, tracker)
    return choose_arithmetic(step)


def make_batch(step: Step) -> dict[str, Tensor]:
    """`input_ids` (micro-batch x tokens), and the mask of padded examples where the step has one."""
    batch = {"input_ids": torch.zeros(step.micro_batch, step.seq_len, dtype=torch.long, device=step.device)}
    if step.masked:
        mask = torch.ones_like(batch["input_ids"])
        if step.device == "cpu":
            mask[0, -step.seq_len // 4 :] = 0
        elif not CAN_FORCE_MASK:  # then it is handed over as transformers would make it: a byte for each pair of tokens
            pairs = (step.micro_batch, 1, step.seq_len, step.seq_len)
            mask = torch.ones(pairs, dtype=torch.bool, device=step.device)
        batch["attention_mask"] = mask
    return batch


# ------------------------------------------------------------------------------------------------------- attention


def choose_attention(step: Step) -> None:
    """Make transformers' "sdpa" the kernel that the card would run; the name stays, so that masks are built as for sdpa.

    With `step.masked` the mask is built even where it would be left out, as it is for examples of different lengths.
    """
    if CAN_FORCE_MASK and step.masked and step.device == "meta":  # a batch of a real step is really padded
        masking_utils._ignore_causal_mask_sdpa = lambda *args, **kwargs: False

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        groups, causal = getattr(module, "num_key_value_groups", 1), mask is None
        if step.attention == "math":
            shared = {"scale": scaling, "enable_gqa": groups > 1}
            out = aten._scaled_dot_product_attention_math(query, key, value, mask, 0.0, causal, None, **shared)
        elif step.attention == "flash" and causal:
            out = aten._scaled_dot_product_flash_attention(query, key, value, 0.0, True, False, scale=scaling)
        else:  # "efficient", or flash with a mask, which flash attention cannot take
            key, value = repeat_kv(key, groups), repeat_kv(value, groups)
            scores = (None if causal else _bias(mask, query, key), torch.is_grad_enabled(), 0.0, causal)
            out = aten._scaled_dot_product_efficient_attention(query, key, value, *scores, scale=scaling)
        return out[0].transpose(1, 2).contiguous(), None

    real = step.attention == "eager" or (step.device == "cpu" and step.attention != "math")
    ALL_ATTENTION_FUNCTIONS.register("sdpa", sdpa_attention_forward if real else attend)


def _bias(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """What is added to the scores: 0, or minus infinity where a pair of tokens is masked."""
    if mask.dtype == torch.bool:
        blocked = torch.full((), float("-inf"), dtype=query.dtype, device=query.device)
        mask = torch.where(mask, torch.zeros((), dtype=query.dtype, device=query.device), blocked)
    return mask.expand(*query.shape[:3], key.shape[2])


# ------------------------------------------------------------------------------------------------------- loss head


def choose_loss_head(step: Step, tracker: MemoryTracker) -> None:
    """Let TRL's head run on the meta device as it runs on the card: with Triton no temporaries, without them the torch ones."""
    if step.device == "meta":
        # PEFT asks without a device (its inputs then stay as they are), TRL's head asks for the device of its tensors.
        torch.is_autocast_enabled = lambda device=None: step.autocast and device is None
    if step.loss_head == "full":
        return
    if missing_names():
        raise RuntimeError(f"TRL has no {', '.join(missing_names())}, so its loss head cannot be followed")
    trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE = step.loss_tile
    if step.device != "meta":
        return

    def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:  # CUDA sums in fp32 without copies
        tracker.flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]

    trl_kernels._addmm_fp32 = add_product
    if step.loss_head == "triton":
        trl_utils._use_triton = lambda device: True
        trl_kernels._forward_tile = trl_kernels._backward_tile = lambda *tile_and_statistics, **flags: None


# ------------------------------------------------------------------------------------------------------ arithmetic


class Autocast:
    """What `torch.autocast` does to a QLoRA model, for the meta device, which it refuses.

    fp32 weights of linear layers (the adapters) are cast for each multiplication. The casts are kept until the forward pass ends: set
    `kept` to None then.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.kept: dict[int, Tensor] | None = {}

    def linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """In place of `torch.nn.functional.linear`."""
        if weight.dtype is not torch.float32:
            return linear(input, weight, bias)
        if self.kept is None:
            cast = weight.to(self.dtype)
        elif (cast := self.kept.get(id(weight))) is None:
            cast = self.kept[id(weight)] = weight.to(self.dtype)
        return linear(input.to(self.dtype), cast, bias)


class FusedSoftmax(torch.autograd.Function):
    """CUDA turns fp16 scores into fp32 probabilities in one kernel; the meta device would make an fp32 copy first."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor) -> Tensor:
        """Nothing but the result."""
        probabilities = torch.empty(scores.shape, dtype=torch.float32, device=scores.device)
        ctx.save_for_backward(probabilities)
        ctx.dtype = scores.dtype
        return probabilities

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """With the kernel's own temporary."""
        (probabilities,) = ctx.saved_tensors
        product = gradient * probabilities
        return torch.empty(product.shape, dtype=ctx.dtype, device=product.device)


def choose_arithmetic(step: Step) -> Autocast:
    """Make linear layers and softmax behave as on the card, in the backward pass's recomputation too (so: patched, not a mode)."""
    autocast = Autocast(getattr(torch, step.dtype))
    if step.autocast:
        functional.linear = autocast.linear

    def fused(input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Tensor:
        if input.is_meta and input.dtype is torch.float16 and dtype is torch.float32:
            return FusedSoftmax.apply(input)
        return softmax(input, dim, _stacklevel, dtype)

    functional.softmax = fused
    return autocast

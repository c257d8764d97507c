"""The model of a dry run: transformers' class, bitsandbytes' layers and PEFT's adapters, without weights and without a GPU.

Used by `helpers.dryrun.worker` only: it changes transformers' attention function and bitsandbytes' caches.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import bitsandbytes as bnb
import torch
import trl.trainer.utils as trl_utils
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, masking_utils
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from helpers.dryrun import Step

aten = torch.ops.aten
# transformers leaves the mask out where no token is padded. On the meta device that question has no answer, so it is answered here.
IGNORE_CAUSAL_MASK = getattr(masking_utils, "_ignore_causal_mask_sdpa", None)


def build(step: Step) -> PreTrainedModel:
    """The model of `step` with quantized layers and adapters, on `step.device`, ready to train."""
    settings = dict(step.model)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    dtype = getattr(torch, step.dtype)
    choose_attention(step)
    implementation = "eager" if step.attention == "eager" else "sdpa"
    with torch.device(step.device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=implementation)
    model.config.use_cache = False
    if step.quantization == "nf4":
        quantize(model, step.device, dtype, step.double_quant)
    with torch.device(step.device):
        if step.fp32_upcast:
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        adapter = LoraConfig(
            r=step.r,
            lora_alpha=2 * step.r,
            lora_dropout=step.lora_dropout,
            target_modules=step.target_modules,
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(model, adapter)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(getattr(torch, step.adapter_dtype))
    if step.loss_head != "full":
        trl_utils.add_fused_lm_head(model.get_base_model(), outputs=("log_probs", "entropy", "is_top1"))
    model.train()
    return model


def quantize(model: PreTrainedModel, device: str, dtype: torch.dtype, double_quant: bool) -> None:
    """Replace each linear layer but the output head by bitsandbytes' NF4 layer, with packed weight and scales of true size."""
    functional = bnb.functional
    if "dynamic" not in functional.name2qmap or functional.name2qmap["dynamic"].is_meta:
        functional.name2qmap["dynamic"] = (
            functional.create_dynamic_map()
        )  # else a meta run would cache a map without values
    for parent in list(model.modules()):
        for name, linear in list(parent.named_children()):
            if type(linear) is not torch.nn.Linear or name == "lm_head":
                continue
            quantized = bnb.nn.Linear4bit(
                linear.in_features,
                linear.out_features,
                bias=linear.bias is not None,
                compute_dtype=dtype,
                compress_statistics=double_quant,
                quant_type="nf4",
                device=device,
            )
            weight = bnb.nn.Params4bit(
                linear.weight.data,
                requires_grad=False,
                quant_type="nf4",
                compress_statistics=double_quant,
                module=quantized,
            )
            quantized.weight = weight._quantize(device)
            quantized.support_avx512bf16_for_cpu = False
            if linear.bias is not None:
                quantized.bias = torch.nn.Parameter(linear.bias.data, requires_grad=False)
            setattr(parent, name, quantized)
    model.is_loaded_in_4bit = True


def make_batch(step: Step) -> dict[str, torch.Tensor]:
    """`input_ids` (micro-batch x tokens), and the mask of padded examples where the step has one."""
    batch = {"input_ids": torch.zeros(step.micro_batch, step.seq_len, dtype=torch.long, device=step.device)}
    if step.masked:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        if step.device == "cpu":
            batch["attention_mask"][0, -step.seq_len // 4 :] = 0
        elif (
            IGNORE_CAUSAL_MASK is None
        ):  # then the finished mask is handed over: one byte for each pair of tokens, as transformers makes it
            batch["attention_mask"] = torch.ones(
                step.micro_batch, 1, step.seq_len, step.seq_len, dtype=torch.bool, device=step.device
            )
    return batch


def choose_attention(step: Step) -> None:
    """Make transformers' "sdpa" the kernel that the card would run; the name stays, so that masks are built as for sdpa.

    With `step.masked` the mask is built even where it would be left out, as it is for examples of different lengths.
    """
    if IGNORE_CAUSAL_MASK is not None:
        pretend = step.masked and step.device == "meta"  # a batch of a real step is really padded
        masking_utils._ignore_causal_mask_sdpa = (lambda *args, **kwargs: False) if pretend else IGNORE_CAUSAL_MASK
    if step.attention == "eager" or (step.device == "cpu" and step.attention != "math"):
        ALL_ATTENTION_FUNCTIONS.register("sdpa", sdpa_attention_forward)
        return

    def attend(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        groups = getattr(module, "num_key_value_groups", 1)
        if step.attention == "math":
            out = aten._scaled_dot_product_attention_math(
                query,
                key,
                value,
                attention_mask,
                0.0,
                attention_mask is None,
                None,
                scale=scaling,
                enable_gqa=groups > 1,
            )[0]
        elif step.attention == "flash" and attention_mask is None:
            out = aten._scaled_dot_product_flash_attention(query, key, value, 0.0, True, False, scale=scaling)[0]
        else:  # "efficient", or flash with a mask, which flash attention cannot take
            key, value = repeat_kv(key, groups), repeat_kv(value, groups)
            bias = attention_mask
            if bias is not None:
                if bias.dtype == torch.bool:
                    blocked = torch.full((), float("-inf"), dtype=query.dtype, device=query.device)
                    bias = torch.where(bias, torch.zeros((), dtype=query.dtype, device=query.device), blocked)
                bias = bias.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
            out = aten._scaled_dot_product_efficient_attention(
                query, key, value, bias, torch.is_grad_enabled(), 0.0, bias is None, scale=scaling
            )[0]
        return out.transpose(1, 2).contiguous(), None

    ALL_ATTENTION_FUNCTIONS.register("sdpa", attend)


def resident_tensors(model: PreTrainedModel) -> Iterator[torch.Tensor]:
    """Every tensor that stays on the card between steps, the scales of quantized weights included."""
    for tensor in [*model.parameters(), *model.buffers()]:
        yield tensor
        state = getattr(tensor, "quant_state", None)
        if state is not None:
            yield from (state.absmax, state.code)
            if state.nested:
                yield from (state.offset, state.state2.absmax, state.state2.code)

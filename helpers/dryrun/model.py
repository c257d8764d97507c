"""The model of a dry run: transformers' class, bitsandbytes' layers and PEFT's adapters, without weights and without a GPU."""

from __future__ import annotations

import bitsandbytes as bnb
import torch
import trl.trainer.utils as trl_utils
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from helpers.dryrun import Step
from helpers.dryrun.allocator import Event
from helpers.dryrun.tracker import MemoryTracker
from helpers.hardware import loaded_tensors


def build(step: Step) -> PreTrainedModel:
    """The model of `step` with quantized layers and adapters, on `step.device`, ready to train."""
    settings = dict(step.model)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    dtype = getattr(torch, step.dtype)
    attention = "eager" if step.attention == "eager" else "sdpa"
    with torch.device(step.device):
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention, trust_remote_code=False
        )
    model.config.use_cache = False
    if step.quantization == "nf4":
        quantize(model, step.device, dtype, step.double_quant)
    adapter = LoraConfig(
        r=step.r, lora_dropout=step.lora_dropout, target_modules=step.target_modules, task_type="CAUSAL_LM"
    )
    with torch.device(step.device):
        if step.fp32_upcast:
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        model = get_peft_model(model, adapter)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(getattr(torch, step.adapter_dtype))
    if step.loss_head != "full":
        trl_utils.add_fused_lm_head(model.get_base_model(), outputs=("log_probs", "entropy", "is_top1"))
    return model.train()


def quantize(model: PreTrainedModel, device: str, dtype: torch.dtype, double_quant: bool) -> None:
    """Replace each linear layer but the output head by bitsandbytes' NF4 layer, with packed weight and scales of true size."""
    bnb.functional.name2qmap["dynamic"] = bnb.functional.create_dynamic_map()  # else one without values would be cached
    how = {"compress_statistics": double_quant, "quant_type": "nf4"}
    for parent in list(model.modules()):
        for name, linear in list(parent.named_children()):
            if type(linear) is torch.nn.Linear and name != "lm_head":
                sizes = linear.in_features, linear.out_features
                layer = bnb.nn.Linear4bit(*sizes, bias=False, compute_dtype=dtype, device=device, **how)
                weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, module=layer, **how)
                layer.weight, layer.bias = weight._quantize(device), linear.bias
                layer.support_avx512bf16_for_cpu = False  # as in training (`helpers.compat.keep_weights_trainable`)
                setattr(parent, name, layer)
    model.is_loaded_in_4bit = True


def load(step: Step, model: PreTrainedModel, tracker: MemoryTracker) -> list[Event]:
    """Count what stays on the card, and say what loading it did to the allocator.

    With `step.load_in`, transformers first asks for the model's size in one piece and gives it back; then weights arrive in 16 bit,
    and are quantized one after another.
    """
    if not step.load_in:
        for tensor in loaded_tensors(model):
            tracker.add(tensor)
        return list(tracker.trace)
    element = getattr(torch, step.load_in).itemsize
    base = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    whole = sum(_weights(parameter) * (0.5 if _quantized(parameter) else element) for parameter in base)
    events: list[Event] = [("whole model", int(whole)), ("whole model", -1)]
    upcasts: list[Event] = []  # over the loaded model
    for tensor in loaded_tensors(model):
        added = tracker.add(tensor)
        if added is None:
            continue
        arriving = ("16 bit", added[0])
        frozen = isinstance(tensor, torch.nn.Parameter) and not tensor.requires_grad
        if _quantized(tensor):
            events += [(arriving, element * _weights(tensor)), added, (arriving, -1)]
        elif step.fp32_upcast and frozen and tensor.dtype is torch.float32:
            events.append((arriving, element * tensor.numel()))
            upcasts += [added, (arriving, -1)]
        else:
            events.append(added)
    return events + upcasts


def _quantized(tensor: torch.Tensor) -> bool:
    return getattr(tensor, "quant_state", None) is not None


def _weights(tensor: torch.Tensor) -> int:
    """How many, before they were packed into bytes."""
    return tensor.quant_state.shape.numel() if _quantized(tensor) else tensor.numel()

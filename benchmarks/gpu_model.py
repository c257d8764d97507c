"""What `benchmarks.gpu` trains: models of real shapes with random weights, and texts of chosen lengths. Nothing is downloaded.

A model is built layer by layer on the card and quantized as bitsandbytes does when it loads, so no more than one layer is there in 16 bit.
Random weights need the memory and the time of trained ones; only the losses mean nothing.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import bitsandbytes as bnb
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils.quantization_config import QuantizationMethod

from helpers.compat import keep_weights_trainable
from helpers.hardware import count_as_free
from helpers.registry import ModelShape

DEVICE = "cuda"
SPREAD = 0.02  # standard deviation of the weights: activations of a 32-layer model then stay far below fp16's 65504
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
WORDS = [f"word{n}" for n in range(400)]  # one token each
CHAT_TEMPLATE = "{% for message in messages %}<s> {{ message['content'] }} </s> {% endfor %}{% if add_generation_prompt %}<s>{% endif %}"
TEMPLATE_TOKENS = 3  # what it adds to one message and the beginning of an answer


def random_model(shape: ModelShape, dtype: torch.dtype) -> PreTrainedModel:
    """A model of this shape on the card: linear layers with random NF4 weights, the rest in `dtype`; as `load_quantized` leaves one."""
    settings = shape.to_config()
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    numbers = torch.Generator(DEVICE).manual_seed(0)
    _compute_buffers(model)
    _quantize_linear_layers(model, dtype, numbers)
    _fill_the_rest(model, numbers)
    model.is_loaded_in_4bit, model.quantization_method = True, QuantizationMethod.BITS_AND_BYTES
    model.config.quantization_config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    keep_weights_trainable(model)
    count_as_free(model)
    return model.eval()


def _random(size: torch.Size, dtype: torch.dtype, numbers: torch.Generator) -> torch.Tensor:
    """Made in place: on the card there is only one such matrix at a time."""
    return torch.empty(size, dtype=dtype, device=DEVICE).normal_(0, SPREAD, generator=numbers)


def _compute_buffers(model: PreTrainedModel) -> None:
    """What is computed and never loaded (rotary frequencies, Gemma's scale), by transformers' own function for models made without values."""
    for module in model.modules():
        on_meta = {name: buffer for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta}
        if on_meta:
            module._buffers.update({name: torch.empty_like(buffer, device=DEVICE) for name, buffer in on_meta.items()})
            model._init_weights(module)


def _quantize_linear_layers(model: PreTrainedModel, dtype: torch.dtype, numbers: torch.Generator) -> None:
    for parent in list(model.modules()):
        for name, linear in list(parent.named_children()):
            if type(linear) is not torch.nn.Linear or name == "lm_head":
                continue
            new = bnb.nn.Linear4bit(
                linear.in_features,
                linear.out_features,
                bias=linear.bias is not None,
                compute_dtype=dtype,
                compress_statistics=True,
                quant_type="nf4",
                device="meta",
            )
            new.weight = bnb.nn.Params4bit(
                _random(linear.weight.shape, dtype, numbers),
                requires_grad=False,
                quant_type="nf4",
                compress_statistics=True,
                module=new,
            )
            new.weight = new.weight._quantize(DEVICE)
            if linear.bias is not None:
                new.bias = torch.nn.Parameter(
                    torch.zeros(linear.out_features, dtype=dtype, device=DEVICE), requires_grad=False
                )
            setattr(parent, name, new)


def _fill_the_rest(model: PreTrainedModel, numbers: torch.Generator) -> None:
    """Embeddings, norms and the output head, which may be the embedding itself."""
    made: dict[torch.nn.Parameter, torch.nn.Parameter] = {}
    for module in list(model.modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not parameter.is_meta:
                continue
            if parameter not in made:
                if parameter.dim() == 1:  # a norm's factors
                    value = torch.ones_like(parameter, device=DEVICE)
                else:
                    value = _random(parameter.shape, parameter.dtype, numbers)
                made[parameter] = torch.nn.Parameter(value, requires_grad=False)
            setattr(module, name, made[parameter])
    model.tie_weights()
    left = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    if left:
        raise RuntimeError(f"These parts of {model.config.model_type} got no values: {', '.join(left[:5])}")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word of `WORDS`, with a chat template."""
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def lengths(examples: int, micro_batch: int, longest: int, step: int) -> list[int]:
    """Tokens of each example, optimizer step after optimizer step, each of `step` examples.

    Every second step, from the first on, has the worst micro-batch that a plan is made for, once it is sorted: all examples have the full
    length but one, so that the batch is padded and attention gets a mask. All others are shorter, of four different lengths.
    """
    sizes = []
    for number in range(examples):
        row = number % step
        if number // step % 2 or row >= micro_batch:
            sizes.append(longest * (5 - row % 4) // 8)
        else:
            sizes.append(longest * 3 // 4 if row and row == micro_batch - 1 else longest)
    return sizes


def texts(sizes: list[int], seed: int = 0) -> Dataset:
    """One text for each size: so many tokens once the trainer has added the end token. All of them are trained."""
    chosen = _words(seed)
    return Dataset.from_dict({"text": [" ".join(next(chosen) for _ in range(size - 1)) for size in sizes]})


def prompts(count: int, longest: int) -> list[list[dict[str, str]]]:
    """Chat prompts of unequal lengths, the longest with `longest` tokens once the template is around them."""
    chosen = _words(seed=1)
    sizes = [longest - TEMPLATE_TOKENS - (number % 4) * longest // 8 for number in range(count)]
    return [[{"role": "user", "content": " ".join(next(chosen) for _ in range(size))}] for size in sizes]


def _words(seed: int) -> Iterator[str]:
    numbers = random.Random(seed)
    while True:
        yield numbers.choice(WORDS)

"""How much GPU memory one training step needs: an instant formula in named parts that add up.

    estimate(shape, micro_batch=4, seq_len=512).total_bytes

Every part is a tensor that really exists at the moment of the peak, so the parts can be shown as a stacked bar. Assumes flash or
memory-efficient attention, LoRA without dropout, adapters in fp32, and TRL's tiled loss head. Pure arithmetic, no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from helpers.hardware import MIB
from helpers.registry import ModelShape

CUDA_CONTEXT = 250 * MIB  # the driver's, before the first tensor: 141 MiB measured on a T4, up to 250 assumed elsewhere
CUBLAS_WORKSPACES = 2 * 8320 * 1024  # cuBLAS and cuBLASLt keep 8.125 MiB each (a constant in 41 recorded T4 runs)
LOSS_TILE_TOKENS, LOSS_TILE_VOCABULARY = 4096, 32768  # what TRL's loss head holds at once
TORCH_TILE_COPIES = 29  # bytes per tile entry besides, in plain torch: fp32 logits, probabilities, gradients, masks
OFFLOAD_IN_FLIGHT = 2  # layers whose saved activations are on the card while the rest waits in host memory
ADAMW = 8  # bytes per trained number: two fp32 states
ADAMW_8BIT = 2 * (1 + 4 / 256)  # two 8-bit states, and an fp32 scale per block of 256
QUANTIZATION_BLOCK = 64  # weights that share one scale in NF4
GATHERED_LAYERS = 2  # FSDP2 has the layer in use whole on each card, and the next on its way
NCCL_BUFFERS = 300 * MIB  # what cards need to talk to each other; assumed, not yet measured
FOR_MANY_GPUS = ("gradients on their way", "layers gathered for use", "NCCL")  # parts that one card alone does not have


@dataclass(frozen=True)
class MemoryEstimate:
    """Peak bytes by part. Only what is alive at the moment of the peak is in `parts`, so `sum(parts) == total_bytes`."""

    parts: dict[str, int]
    peak_moment: str

    @property
    def total_bytes(self) -> int:
        """All parts together."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class StepSetup:
    """One optimizer step, as far as memory is concerned: what `estimate` takes."""

    shape: ModelShape
    micro_batch: int
    seq_len: int
    r: int = 16
    target_modules: str | list[str] = "all-linear"
    checkpointing: str = "on"  # "off", "selective" (attention's output is kept) or "on"
    quantization: str = "nf4"  # or "none"
    double_quant: bool = True
    fp32_upcast: bool = False  # embeddings, norms, hidden states in fp32, as `prepare_model_for_kbit_training` has it
    element_bytes: int = 2  # per activation or unquantized weight: 2 in fp16/bf16, 4 in fp32
    optimizer_bytes: float = ADAMW_8BIT  # per trained number
    attention: str = "flash"  # or "efficient", "math", "eager"
    loss_head: str = "triton"  # TRL's with Triton or in plain "torch"; or "full" logits, as transformers computes them
    loss_tile: int = LOSS_TILE_VOCABULARY  # vocabulary entries that TRL's head handles at a time
    offload: bool = False  # saved activations wait in host memory
    on_gpu: bool = True  # count what CUDA's libraries take ...
    context: bool = True  # ... and the driver's context (which what is free may have left out already)
    gpus: int = 1  # cards that take part: each with the whole model (DDP) ...
    sharded: bool = False  # ... or with a part of each layer (FSDP2)

    @property
    def tokens(self) -> int:
        """In one micro-batch."""
        return self.micro_batch * self.seq_len

    @property
    def hidden_bytes(self) -> int:
        """Per number of what flows from layer to layer."""
        return 4 if self.fp32_upcast else self.element_bytes

    @property
    def trainable(self) -> int:
        """Parameters of the adapter."""
        return self.shape.lora_parameters(self.r, self.target_modules)


def nf4_bytes(parameters: int, double_quant: bool = True) -> int:
    """Bytes of `parameters` weights in NF4: 4 bits each, plus one scale per block of 64.

    Without double quantization a scale is fp32 (0.5 bit per weight). With it, a scale is 8 bit, and each 256 scales share one
    fp32 number (0.127 bit per weight): QLoRA, arXiv 2305.14314, section 3.
    """
    blocks = parameters / QUANTIZATION_BLOCK
    return int(parameters / 2 + (blocks + 4 * blocks / 256 if double_quant else 4 * blocks))


def estimate(shape: ModelShape, micro_batch: int, seq_len: int, **settings: Any) -> MemoryEstimate:
    """Peak memory of one optimizer step, on each card. `settings` are the other fields of `StepSetup`."""
    step = StepSetup(shape, micro_batch, seq_len, **settings)
    always, saved, moments = resident(step), *activations(step)
    moments["computing the loss"] = saved | {"loss head": loss(step)}
    candidates = [MemoryEstimate(always | parts, moment) for moment, parts in moments.items()]
    return max(candidates, key=lambda candidate: candidate.total_bytes)


def resident(step: StepSetup) -> dict[str, int]:
    """Parts that stay from step to step: weights, adapters, optimizer, what CUDA's libraries keep."""
    shape, trainable, nf4 = step.shape, step.trainable, step.quantization == "nf4"
    shards = step.gpus if step.sharded else 1  # into which each weight is divided
    linears = shape.linear_parameters()
    base = nf4_bytes(linears, step.double_quant) if nf4 else linears * step.element_bytes
    codes = linears // 2 if nf4 else base  # two in a byte; their scales are no parameters, so FSDP leaves them whole
    others = shape.other_parameters() * step.hidden_bytes
    parts = {
        "base weights": codes // shards + base - codes,
        "embeddings and norms": others // shards,
        "adapters (fp32)": 4 * trainable // shards,
        "optimizer": int(step.optimizer_bytes * trainable / shards),
    }
    if shards > 1:  # embeddings and output layer stay gathered from the first layer forward to the first backward
        gathered = GATHERED_LAYERS * (codes + step.element_bytes * trainable) // shape.num_hidden_layers
        parts["layers gathered for use"] = gathered + others
    elif step.gpus > 1:  # DDP keeps a second copy of the adapters' gradients, which it sends in pieces
        parts["gradients on their way"] = 4 * trainable
    if step.gpus > 1 and step.on_gpu:
        parts["NCCL"] = NCCL_BUFFERS
    if step.on_gpu:
        parts["CUDA and libraries"] = CUDA_CONTEXT * step.context + CUBLAS_WORKSPACES
    return parts


def activations(step: StepSetup) -> tuple[dict[str, int], dict[str, dict[str, int]]]:
    """(what the forward pass saved, moment of the backward pass -> parts besides the resident ones)."""
    shape, tokens, e, trainable = step.shape, step.tokens, step.element_bytes, step.trainable
    h, q, layers = shape.hidden_size, shape.query_size, shape.num_hidden_layers
    # Examples of different lengths are padded: one byte of mask for each pair of tokens (eager attention: one number).
    # Each layer makes a bias for its scores of it, and keeps that as long as its activations.
    eager = step.attention == "eager"
    mask = tokens * step.seq_len * (e if eager else 1) if step.micro_batch > 1 else 0
    # Eager attention's scores: probabilities in fp32 and in 16 bit, and what the soft cap saves.
    scores = tokens * step.seq_len * shape.num_attention_heads * (4 + 2 * e) if eager else 0
    layer = layer_bytes(step) + scores + (0 if eager else e * mask)
    backward = max(tokens * e * (2 * shape.intermediate_size + h), scores)  # gradients through one MLP, or the scores
    matrix = h * shape.intermediate_size  # the largest weight, unpacked from NF4, and its scales
    unpacked = {"unpacked weights": e * matrix + matrix // 16 if step.quantization == "nf4" else 0}
    casts = e * trainable if e == 2 else 0  # 16-bit copies of the fp32 adapters, kept while a layer's activations are
    if step.checkpointing == "off":
        saved = {"saved activations": layer * layers + casts + mask}
        moments = {"in the backward pass": saved | {"backward pass": backward + final_norm_bytes(step)} | unpacked}
    else:
        kept = tokens * (step.hidden_bytes * h + (e * q if step.checkpointing == "selective" else 0))  # per layer
        saved = {"saved activations": kept * layers + mask}
        again = {"one layer, recomputed": layer + backward + casts // layers} | unpacked
        gradients = 4 * trainable // (step.gpus if step.sharded else 1)
        # Going back, saved activations are used up while gradients pile up.
        last = saved | again | {"gradients": 4 * trainable // layers}
        first = {"saved activations": kept + mask} | again | {"gradients": gradients}
        moments = {"in the backward pass of the last layer": last, "in the backward pass of the first layer": first}
    if step.offload:
        saved = {"saved activations": tokens * e * h * OFFLOAD_IN_FLIGHT + mask}
        moments = {moment: parts | saved for moment, parts in moments.items()}
    return saved, moments


def layer_bytes(step: StepSetup) -> int:
    """What one layer saves for its backward pass, tensor by tensor, without mask and scores of attention."""
    shape, e = step.shape, step.element_bytes
    h, i, q, kv = shape.hidden_size, shape.intermediate_size, shape.query_size, shape.key_value_size
    adapted = shape.linear_layers() if step.target_modules == "all-linear" else step.target_modules
    # Flash attention without a mask takes keys and values as they are; other kernels get them repeated for every head.
    keys_and_values = 2 * kv if step.attention == "flash" and step.micro_batch == 1 else 2 * q
    per_token = 8 * h + 2 * step.hidden_bytes * h  # twice: a norm's input in fp32, and its output
    # Queries and attention's output; keys and values; gate, up, silu(gate) and their product; the small LoRA outputs.
    per_token += e * (2 * q + keys_and_values + 4 * i + len(adapted) * step.r)
    per_token += 4 * shape.num_attention_heads + 8  # softmax statistics, the norms' factors
    if shape.has("query and key norms"):
        per_token += 4 * (q + kv)  # the norms' inputs in fp32
    if shape.has("norms after attention and MLP"):
        per_token += 8 * h
    if shape.has("fused matrices"):  # queries and keys stay alive in one piece with the values; two dropout masks
        per_token += e * (q + kv) + 2 * h
    return step.tokens * per_token


def loss(step: StepSetup) -> int:
    """Bytes that computing the loss takes besides the saved activations, with the final norm."""
    tokens, h, vocabulary, e = step.tokens, step.shape.hidden_size, step.shape.vocab_size, step.element_bytes
    if step.loss_head == "full":  # the returned logits; log-softmax and two gradients of their size, all in fp32
        return tokens * ((step.hidden_bytes + 12) * vocabulary + 2 * h) + final_norm_bytes(step)
    tile = min(tokens, LOSS_TILE_TOKENS) * min(vocabulary, step.loss_tile)
    copies = TORCH_TILE_COPIES if step.loss_head == "torch" else 0
    return tile * (e + copies) + tokens * 3 * e * h + final_norm_bytes(step)


def final_norm_bytes(step: StepSetup) -> int:
    """The norm after the last layer: its input, its output and what it saves."""
    return step.tokens * 4 * step.hidden_bytes * step.shape.hidden_size


def flops_and_bytes(
    shape: ModelShape, micro_batch: int, seq_len: int, checkpointing: str = "on", quantization: str = "nf4"
) -> tuple[float, float]:
    """(floating-point operations, bytes read and written) of one micro-batch, roughly: enough to rank settings by speed.

    Each weight takes part in two multiplications forward and two backward (only the input's gradient: the weight is frozen), and
    in two more where checkpointing recomputes the layer. Unpacking NF4 writes and reads every weight in 16 bit each time.
    """
    h, i, layers = shape.hidden_size, shape.intermediate_size, shape.num_hidden_layers
    tokens, linears = micro_batch * seq_len, shape.linear_parameters()
    passes = 2 if checkpointing == "off" else 3
    scores = 4 * micro_batch * seq_len**2 * shape.query_size * layers
    attention = scores * (3.5 if checkpointing == "on" else 2.5)  # backward costs two and a half times the forward pass
    head = 2 * tokens * shape.vocab_size * h * 3  # logits, the same again backward, and their gradient
    moved = tokens * 2 * (30 * h + 14 * i) * layers * passes  # activations
    weights = linears * passes * (4.5 if quantization == "nf4" else 2)
    return 2 * tokens * linears * passes + attention + head, moved + weights

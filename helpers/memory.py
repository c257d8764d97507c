"""How much GPU memory one training step needs: an instant formula in named parts that add up.

    estimate(shape, micro_batch=4, seq_len=512).total_bytes

Every term is a tensor that really exists at the moment of the peak, so the parts can be shown as a stacked bar. N is the number
of tokens in a micro-batch (micro-batch x sequence length); bytes per number are 2 for fp16/bf16 and 4 for fp32. Assumes flash or
memory-efficient attention, LoRA without dropout, adapters in fp32, and TRL's tiled loss head. Pure arithmetic, no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from helpers.registry import ModelShape

MIB, GIB = 2**20, 2**30
CUDA_CONTEXT = (
    250 * MIB
)  # what the driver takes before the first tensor; 141 MiB measured on a T4, up to 250 assumed elsewhere
CUBLAS_WORKSPACES = (
    2 * 8320 * 1024
)  # cuBLAS and cuBLASLt keep 8.125 MiB each (seen as a constant in 41 recorded T4 runs)
LOSS_TILE_TOKENS, LOSS_TILE_VOCABULARY = 4096, 32768  # what TRL's loss head holds at once
TORCH_TILE_COPIES = (
    29  # bytes per tile entry that its plain torch path keeps besides: fp32 logits, probabilities, gradients, masks
)
OFFLOAD_IN_FLIGHT = 2  # layers whose saved activations are on the card at a time while the rest waits in host memory
ADAMW = 8  # bytes per trained number: two fp32 states
ADAMW_8BIT = 2 * (1 + 4 / 256)  # two 8-bit states, and an fp32 scale per block of 256
QUANTIZATION_BLOCK = 64  # weights that share one scale in NF4
GATHERED_LAYERS = 2  # FSDP2 has the layer in use whole on each card, and the next on its way
NCCL_BUFFERS = 300 * MIB  # what cards need to talk to each other; assumed, not yet measured
FOR_MANY_GPUS = ("gradients on their way", "layers gathered for use", "NCCL")  # parts that one card alone does not have


@dataclass(frozen=True)
class MemoryEstimate:
    """Peak bytes by part. Only what is alive at the moment of the peak is in `parts`, so `sum(parts) == total_bytes`."""

    parts: dict[str, int] = field(default_factory=dict)
    peak_moment: str = ""

    @property
    def total_bytes(self) -> int:
        return sum(self.parts.values())

    def __str__(self) -> str:
        rows = [f"  {name:<22}{size / GIB:6.2f} GiB" for name, size in self.parts.items()]
        return "\n".join([*rows, f"  {'peak':<22}{self.total_bytes / GIB:6.2f} GiB, while {self.peak_moment}"])


def nf4_bytes(parameters: int, double_quant: bool = True) -> int:
    """Bytes of `parameters` weights in NF4: 4 bits each, plus one scale per block of 64.

    Without double quantization a scale is fp32 (0.5 bit per weight). With it, a scale is 8 bit, and each 256 scales share one
    fp32 number (0.127 bit per weight): QLoRA, arXiv 2305.14314, section 3.
    """
    blocks = parameters / QUANTIZATION_BLOCK
    return int(parameters / 2 + (blocks + 4 * blocks / 256 if double_quant else 4 * blocks))


def estimate(
    shape: ModelShape,
    micro_batch: int,
    seq_len: int,
    *,
    r: int = 16,
    target_modules: str | list[str] = "all-linear",
    checkpointing: str = "on",
    quantization: str = "nf4",
    double_quant: bool = True,
    fp32_upcast: bool = False,
    element_bytes: int = 2,
    optimizer_bytes: float = ADAMW_8BIT,
    attention: str = "flash",
    loss_head: str = "triton",
    loss_tile: int = LOSS_TILE_VOCABULARY,
    offload: bool = False,
    on_gpu: bool = True,
    context: bool = True,
    gpus: int = 1,
    sharded: bool = False,
) -> MemoryEstimate:
    """Peak memory of one optimizer step, on each card.

    Args:
        checkpointing: "off", "selective" (attention's output is kept) or "on".
        element_bytes: size of one activation or unquantized weight: 2 in fp16/bf16, 4 in fp32.
        optimizer_bytes: per trainable parameter; 8-bit AdamW keeps two bytes and an fp32 scale per 256, AdamW in fp32 keeps 8.
        fp32_upcast: `prepare_model_for_kbit_training` was called: embeddings, norms and what flows between layers are in fp32.
        loss_head, loss_tile: TRL's with "triton" or in plain "torch", and the vocabulary entries it handles at a time; or "full"
            logits, as transformers computes them.
        offload: saved activations wait in host memory.
        on_gpu: adds what CUDA's libraries take, and, with `context`, the driver's context (which what is free may have left out already).
        gpus, sharded: cards that take part, each with the whole model (DDP) or with a part of each layer (FSDP2).
    """
    h, i, q, kv = shape.hidden_size, shape.intermediate_size, shape.query_size, shape.key_value_size
    layers, heads, e = shape.num_hidden_layers, shape.num_attention_heads, element_bytes
    stream = 4 if fp32_upcast else e  # bytes per number of what flows from layer to layer
    tokens = micro_batch * seq_len
    trainable = shape.lora_parameters(r, target_modules)
    adapted = shape.linear_layers() if target_modules == "all-linear" else target_modules

    linears, parts = shape.linear_parameters(), gpus if sharded else 1
    base, others = (
        nf4_bytes(linears, double_quant) if quantization == "nf4" else linears * e,
        shape.other_parameters() * stream,
    )
    codes = (
        linears // 2 if quantization == "nf4" else base
    )  # two in a byte; their scales are no parameters, so FSDP leaves them whole
    resident = {
        "base weights": codes // parts + base - codes,
        "embeddings and norms": others // parts,
        "adapters (fp32)": 4 * trainable // parts,
        "optimizer": int(optimizer_bytes * trainable / parts),
    }
    if parts > 1:  # embeddings and output layer stay gathered from the first layer forward to the first backward
        resident["layers gathered for use"] = GATHERED_LAYERS * (codes + e * trainable) // layers + others
    elif gpus > 1:  # DDP keeps a second copy of the adapters' gradients, which it sends in pieces
        resident["gradients on their way"] = 4 * trainable
    if gpus > 1 and on_gpu:
        resident["NCCL"] = NCCL_BUFFERS
    if on_gpu:
        resident["CUDA and libraries"] = CUDA_CONTEXT * context + CUBLAS_WORKSPACES

    # One layer's saved activations, tensor by tensor: twice (norm input in fp32, norm output), queries and attention output,
    # keys and values, gate, up, silu(gate) and their product, the small LoRA outputs, softmax statistics, norm factors.
    masked = micro_batch > 1  # examples of different lengths are padded, and flash attention takes no mask
    keys_and_values = (
        2 * kv if attention == "flash" and not masked else 2 * q
    )  # other kernels get them repeated for every head
    layer = tokens * (8 * h + 2 * stream * h + e * (2 * q + keys_and_values + 4 * i + len(adapted) * r) + 4 * heads + 8)
    if shape.has("query and key norms"):
        layer += tokens * 4 * (q + kv)  # the norms' inputs in fp32
    if shape.has("norms after attention and MLP"):
        layer += tokens * 8 * h
    if shape.has("fused matrices"):
        layer += tokens * (
            e * (q + kv) + 2 * h
        )  # queries and keys stay alive in one piece with the values; two dropout masks
    scores = tokens * seq_len * heads if attention == "eager" else 0
    layer += scores * (4 + 2 * e)  # probabilities in fp32 and in 16 bit, and what the soft cap saves
    backward = max(
        tokens * e * (2 * i + h), scores * (4 + 2 * e)
    )  # gradients that flow through one MLP, or through the scores
    workspace = (
        e * h * i + (h * i) // 16 if quantization == "nf4" else 0
    )  # one weight matrix unpacked from NF4, and its scales
    casts = e * trainable if e == 2 else 0  # 16-bit copies of the fp32 adapters, kept while a layer's activations are
    # One byte for each pair of tokens; each layer makes a bias for its scores of it, and keeps that as long as its activations.
    mask = micro_batch * seq_len**2 * (e if attention == "eager" else 1) if masked else 0
    bias = e * mask if attention != "eager" else 0

    tile = min(tokens, LOSS_TILE_TOKENS) * min(shape.vocab_size, loss_tile)
    if loss_head == "full":
        # The logits that the model returned; log-softmax and two gradients of its size, all in fp32.
        loss = tokens * ((stream + 12) * shape.vocab_size + 2 * h)
    else:
        loss = tile * (e + (TORCH_TILE_COPIES if loss_head == "torch" else 0)) + tokens * 3 * e * h
    final_norm = tokens * 4 * stream * h

    at_loss = {"loss head": loss + final_norm}
    if checkpointing == "off":
        saved = {"saved activations": (layer + bias) * layers + casts + mask}
        moments = {
            "in the backward pass": saved | {"backward pass": backward + final_norm, "unpacked weights": workspace}
        }
    else:
        kept = tokens * (stream * h + (e * q if checkpointing == "selective" else 0))  # per layer
        saved = {"saved activations": kept * layers + mask}
        at_layer = {"one layer, recomputed": layer + bias + backward + casts // layers, "unpacked weights": workspace}
        moments = {  # going back, saved activations are used up while gradients pile up
            "in the backward pass of the last layer": saved | at_layer | {"gradients": 4 * trainable // layers},
            "in the backward pass of the first layer": {"saved activations": kept + mask}
            | at_layer
            | {"gradients": 4 * trainable // parts},
        }
    if offload:
        saved = {"saved activations": tokens * e * h * OFFLOAD_IN_FLIGHT + mask}
        moments = {moment: parts | saved for moment, parts in moments.items()}
    moments["computing the loss"] = saved | at_loss
    candidates = [MemoryEstimate(resident | parts, moment) for moment, parts in moments.items()]
    return max(candidates, key=lambda candidate: candidate.total_bytes)


def work(
    shape: ModelShape, micro_batch: int, seq_len: int, checkpointing: str = "on", quantization: str = "nf4"
) -> tuple[float, float]:
    """(floating-point operations, bytes read and written) of one micro-batch, roughly: enough to rank settings by speed.

    Each weight takes part in two multiplications forward and two backward (only the input's gradient: the weight is frozen), and
    in two more where checkpointing recomputes the layer. Unpacking NF4 writes and reads every weight in 16 bit each time.
    """
    tokens, linears = micro_batch * seq_len, shape.linear_parameters()
    passes = 2 if checkpointing == "off" else 3
    scores = 4 * micro_batch * seq_len**2 * shape.query_size * shape.num_hidden_layers
    attention = scores * (3.5 if checkpointing == "on" else 2.5)  # backward costs two and a half times the forward pass
    head = 2 * tokens * shape.vocab_size * shape.hidden_size * 3  # logits, the same again backward, and their gradient
    activations = (
        tokens * 2 * (30 * shape.hidden_size + 14 * shape.intermediate_size) * shape.num_hidden_layers * passes
    )
    weights = linears * passes * (4.5 if quantization == "nf4" else 2)
    return 2 * tokens * linears * passes + attention + head, activations + weights


def levers(shape: ModelShape, micro_batch: int, seq_len: int) -> dict[str, MemoryEstimate]:
    """The same training step with one memory lever after the other switched on, for teaching: label -> estimate.

    The first row is the recipe of most QLoRA tutorials: checkpointing, but fp32 embeddings and norms, full logits, AdamW in fp32.
    """
    steps = {
        "the usual recipe": {"double_quant": False, "fp32_upcast": True, "optimizer_bytes": 8, "loss_head": "full"},
        "+ double quantization": {"double_quant": True},
        "+ 8-bit optimizer": {"optimizer_bytes": ADAMW_8BIT},
        "+ no fp32 upcast": {"fp32_upcast": False},
        "+ fused loss head": {"loss_head": "triton"},
        "+ activations in host memory": {"offload": True},
    }
    settings: dict[str, object] = {}
    rows = {}
    for label, change in steps.items():
        settings |= change
        rows[label] = estimate(shape, micro_batch, seq_len, **settings)
    return rows


def memory_at_lengths(
    shape: ModelShape, lengths: Sequence[int] = (256, 512, 1024, 2048, 4096), micro_batch: int = 1, **settings: Any
) -> dict[int, float]:
    """Sequence length -> GiB at the peak of a training step, by the memory formula. `settings` are those of `estimate`."""
    return {length: estimate(shape, micro_batch, length, **settings).total_bytes / GIB for length in lengths}

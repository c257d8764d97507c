"""How much GPU memory one training step needs: an instant formula in named parts that add up.

    estimate(shape, micro_batch=4, seq_len=512).total_bytes

Every term is a tensor that really exists at the moment of the peak, so the parts can be shown as a stacked bar. N is the number
of tokens in a micro-batch (micro-batch x sequence length); bytes per number are 2 for fp16/bf16 and 4 for fp32. Assumes flash or
memory-efficient attention, LoRA without dropout, adapters in fp32, and TRL's tiled loss head. Pure arithmetic, no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from helpers.catalog import ModelShape

MIB, GIB = 2**20, 2**30
CUDA_CONTEXT = 250 * MIB  # what the driver takes before the first tensor; 141 MiB measured on a T4, up to 250 assumed elsewhere
CUBLAS_WORKSPACES = 2 * 8320 * 1024  # cuBLAS and cuBLASLt keep 8.125 MiB each (seen as a constant in 41 recorded T4 runs)
LOSS_TILE = (4096, 32768)  # tokens x vocabulary entries that TRL's loss head holds at once
QUANTISATION_BLOCK = 64  # weights that share one scale in NF4


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

    Without double quantisation a scale is fp32 (0.5 bit per weight). With it, a scale is 8 bit, and each 256 scales share one
    fp32 number (0.127 bit per weight): QLoRA, arXiv 2305.14314, section 3.
    """
    blocks = parameters / QUANTISATION_BLOCK
    return int(parameters / 2 + (blocks + 4 * blocks / 256 if double_quant else 4 * blocks))


def estimate(
    shape: ModelShape,
    micro_batch: int,
    seq_len: int,
    *,
    r: int = 16,
    target_modules: str | list[str] = "all-linear",
    checkpointing: bool = True,
    quantization: str = "nf4",
    element_bytes: int = 2,
    optimizer_bytes: float = 2 * (1 + 4 / 256),
    on_gpu: bool = True,
) -> MemoryEstimate:
    """Peak memory of one optimizer step.

    Args:
        element_bytes: size of one activation or unquantised weight: 2 in fp16/bf16, 4 in fp32.
        optimizer_bytes: per trainable parameter; 8-bit AdamW keeps two bytes and an fp32 scale per 256, AdamW in fp32 keeps 8.
        on_gpu: adds what the CUDA driver and its libraries take.
    """
    h, i, q, kv = shape.hidden_size, shape.intermediate_size, shape.query_size, shape.key_value_size
    layers, heads, vocab, e = shape.num_hidden_layers, shape.num_attention_heads, shape.vocab_size, element_bytes
    tokens = micro_batch * seq_len
    trainable = shape.lora_parameters(r, target_modules)

    linears = shape.linear_parameters()
    resident = {
        "base weights": nf4_bytes(linears) if quantization == "nf4" else linears * e,
        "embeddings and norms": shape.other_parameters() * e,
        "adapters (fp32)": 4 * trainable,
        "optimizer": int(optimizer_bytes * trainable),
    }
    if on_gpu:
        resident["CUDA and libraries"] = CUDA_CONTEXT + CUBLAS_WORKSPACES

    # One layer's saved activations, counted tensor by tensor: twice (norm input in fp32, norm output), queries, attention
    # output, keys, values, gate, up, silu(gate), their product, the small LoRA outputs, softmax statistics, norm factors.
    layer = tokens * (8 * h + e * (2 * h + 2 * q + 2 * kv + 4 * i) + 14 * r * e // 2 + 4 * heads + 8)
    backward = tokens * e * (2 * i + h)  # gradients that flow through one MLP
    workspace = e * h * i + (h * i) // 16 if quantization == "nf4" else 0  # one weight matrix unpacked from NF4, and its scales
    loss = min(tokens, LOSS_TILE[0]) * min(vocab, LOSS_TILE[1]) * e + tokens * 3 * e * h
    final_norm = tokens * 4 * e * h

    if checkpointing:
        saved = {"saved activations": tokens * e * h * layers}
        at_loss = saved | {"loss head": loss + final_norm}
        at_layer = saved | {"one layer, recomputed": layer + backward, "unpacked weights": workspace, "gradients": 4 * trainable}
    else:
        saved = {"saved activations": layer * layers}
        at_loss = saved | {"loss head": loss + final_norm}
        at_layer = saved | {"backward pass": backward + final_norm, "unpacked weights": workspace}
    candidates = [
        MemoryEstimate(resident | at_loss, "computing the loss"),
        MemoryEstimate(resident | at_layer, "in the backward pass"),
    ]
    return max(candidates, key=lambda candidate: candidate.total_bytes)

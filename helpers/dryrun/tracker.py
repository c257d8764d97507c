"""Follows every tensor of a step: bytes alive, their peak, the order of allocations, and the work that was done.

`MemoryTracker` sees each operation that PyTorch dispatches. On the meta device nothing is computed and nothing is stored, but shapes
and lifetimes are the real ones, so the peak of a 13B model's training step can be read on a laptop. What a CUDA kernel allocates
inside itself is invisible there and listed in `CUDA_SCRATCH`.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from helpers.dryrun.allocator import ROUNDING, Event, round_up

aten = torch.ops.aten


def _flash_backward(query: torch.Tensor, key: torch.Tensor) -> int:
    """FlashAttention-2's backward: fp32 accumulator for dQ, softmax sums, and dK/dV expanded to all heads under grouped queries."""
    batch, heads, length, size = query.shape
    scratch = 4 * batch * heads * round_up(length, 128) * (round_up(size, 32 if size <= 128 else 64) + 1)
    if key.shape[1] != heads:
        scratch += 2 * batch * key.shape[2] * heads * size * query.element_size()
    return scratch


# Attention kernel -> matrix products of queries x keys: 2 forward; 5 backward, with the scores computed again. torch's own counter of
# 2.11 stops at shared keys and values.
ATTENTION = {
    aten._scaled_dot_product_flash_attention: 2,
    aten._scaled_dot_product_flash_attention_backward: 5,
    aten._scaled_dot_product_efficient_attention: 2,
    aten._scaled_dot_product_efficient_attention_backward: 5,
}

# Operation -> bytes that its CUDA kernel allocates and frees inside itself (read in PyTorch's sources).
CUDA_SCRATCH = {
    aten._scaled_dot_product_flash_attention_backward.default: lambda grad, q, k, *_: _flash_backward(q, k),
    aten._scaled_dot_product_efficient_attention_backward.default: lambda grad, q, *_: 4 * q.numel(),  # fp32 sum for dQ
    aten._softmax_backward_data.default: lambda grad, *_: grad.nbytes,  # grad * output
    aten._safe_softmax.default: lambda x, *_: x.nbytes + x.numel(),  # result before where(), and a bool mask
}


class MemoryTracker(TorchDispatchMode):
    """Use as a context manager around a step. Sizes in bytes, rounded up to 512 as CUDA does.

    Attributes:
        live, peak: bytes alive now, and the most since `peak` was last set.
        trace: (name, +bytes or -bytes) for every allocation and release, for `helpers.dryrun.allocator.simulate`.
        flops, bytes_moved: floating-point operations, and bytes read and written, of all operations so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.flops = self.bytes_moved = 0
        self.trace: list[Event] = []
        self._watched: dict[int, weakref.ref] = {}
        self._names = itertools.count(1)

    def add(self, tensor: torch.Tensor) -> Event | None:
        """Count the storage of `tensor` until it is released; views of a known storage count nothing."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, round_up(storage.nbytes(), ROUNDING)
        if key in self._watched or not size:
            return None
        name = next(self._names)

        def released(_: weakref.ref) -> None:
            if self._watched.pop(key, None) is not None:
                self.live -= size
                self.trace.append((name, -size))

        self._watched[key] = weakref.ref(storage, released)
        self.live += size
        self.trace.append((name, size))
        return name, size

    def __torch_dispatch__(self, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if operation is torch.ops.bitsandbytes.gemm_4bit.default:
            # For the batches of training (more than 512 rows) CUDA unpacks the weight and multiplies.
            from bitsandbytes.backends.default.ops import _gemm_4bit_default_impl

            with self:
                return _gemm_4bit_default_impl(*args, **kwargs)
        out = _answer_without_data(operation, args)
        if out is None:
            out = operation(*args, **kwargs)
        outputs = list(_tensors(out))
        for tensor in outputs:
            self.add(tensor)
        if not operation.is_view:
            self._count_work(operation, args, kwargs, out, outputs)
        scratch = CUDA_SCRATCH[operation](*args) if operation in CUDA_SCRATCH and outputs[0].is_meta else 0
        if scratch:
            name = next(self._names)
            self.trace += [(name, scratch), (name, -scratch)]
        self.peak = max(self.peak, self.live + scratch)
        return out

    def _count_work(self, operation: Any, args: tuple, kwargs: dict, out: Any, outputs: list[torch.Tensor]) -> None:
        products = ATTENTION.get(operation.overloadpacket)
        count = flop_registry.get(operation.overloadpacket)
        if products is not None:
            query, key = args[1:3] if "backward" in str(operation) else args[:2]
            self.flops += products * 2 * query.numel() * key.shape[2]  # batch x heads x queries x head size x keys
        elif count is not None:
            self.flops += count(*args, **kwargs, out_val=out)
        inputs = _tensors((args, tuple(kwargs.values())))
        self.bytes_moved += sum(tensor.nbytes for tensor in (*inputs, *outputs))


def _answer_without_data(operation: Any, args: tuple) -> Any:
    """Meta tensors hold no values, so questions about values get the answer that needs most memory: nothing is masked."""
    if not (args and isinstance(args[0], torch.Tensor) and args[0].is_meta):
        return None
    tensor = args[0]
    if operation is aten._local_scalar_dense.default:
        return {torch.bool: True, torch.int64: 1}.get(tensor.dtype, 1.0)
    mask = args[1][0] if operation is aten.index.Tensor else None
    if mask is not None and mask.dtype == torch.bool:  # x[mask], all True
        return tensor.reshape(-1, *tensor.shape[mask.dim() :]).clone()
    if operation in (aten._index_put_impl_.default, aten.index_put_.default):
        return tensor
    if operation is aten.masked_scatter_backward.default:
        return torch.empty(tuple(args[2]), dtype=tensor.dtype, device="meta")
    return None


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor in nested tuples and lists (a dry run makes ten thousands of these walks, so it is kept this plain)."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)

"""A forward pass in the precision that training has, for the lessons' own loops. Lesson 02 writes it out once.

with mixed_precision(model) as scale:
    loss = ...
(scale * loss).backward()                    # and every gradient is divided by `scale` before it is used
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


LOSS_SCALE = (
    1024  # a power of two changes no digit; trainers look for the largest that does not overflow, these loops need not
)


@contextmanager
def mixed_precision(model: PreTrainedModel | PeftModel) -> Iterator[int]:
    """Calculate as the trainer does with this model's numbers: 16 bits on a card, while the adapter stays in fp32.

    Gives the factor for the loss: fp16 would round the smallest gradients to zero. In fp32 (a CPU) nothing changes, and the factor is 1.
    """
    with torch.autocast(model.device.type, model.dtype, enabled=model.dtype != torch.float32):
        yield LOSS_SCALE if model.dtype == torch.float16 else 1

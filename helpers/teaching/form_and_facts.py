"""What is learned first, the form or the facts? The loss of an answer's fixed phrases beside the loss of everything else.

form, facts = loss_by_part(model, tokenizer, examples, OPENINGS)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import cross_entropy

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@torch.inference_mode()
def loss_by_part(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Iterable[dict[str, Any]],
    phrases: Sequence[str],
) -> tuple[float, float]:
    """(loss per token of the fixed phrases, loss per token of the rest) over the answers of `examples`.

    Args:
        examples: `prompt` and `completion` messages.
        phrases: texts that every answer contains; each counts where it is first found, one after the other.

    Raises:
        ValueError: no token of any answer belongs to a phrase, or none to the rest.
    """
    was_training = model.training
    model.eval()
    fixed, other = [], []
    try:
        for example in examples:
            before = tokenizer.apply_chat_template(example["prompt"], tokenize=False, add_generation_prompt=True)
            answer = example["completion"][-1]["content"]
            encoded = tokenizer(before + answer, add_special_tokens=False, return_offsets_mapping=True)
            ids = torch.tensor(encoded["input_ids"], device=model.device)
            losses = cross_entropy(
                model(input_ids=ids[None]).logits[0, :-1].float(), ids[1:], reduction="none"
            ).tolist()
            parts = spans(answer, phrases)
            for loss, (start, end) in zip(losses, encoded["offset_mapping"][1:]):
                if start >= len(before):
                    inside = any(first < end - len(before) and start - len(before) < last for first, last in parts)
                    (fixed if inside else other).append(loss)
    finally:
        model.train(was_training)
    if not fixed or not other:
        raise ValueError("These answers do not hold both: a fixed phrase of yours and something else beside it.")
    return sum(fixed) / len(fixed), sum(other) / len(other)


def spans(answer: str, phrases: Sequence[str]) -> list[tuple[int, int]]:
    """(start, end) in characters of each phrase, looked for in order; a phrase that is not there has none."""
    found, since = [], 0
    for phrase in phrases:
        start = answer.find(phrase, since)
        if start >= 0:
            since = start + len(phrase)
            found.append((start, since))
    return found

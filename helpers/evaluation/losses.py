"""The loss of given answers, and perplexity: how surprised is the model by what it should say?

perplexity(model, tokenizer, validation)      # exp(loss per answer token); 1 is certainty, the vocabulary's size is guessing
"""

from __future__ import annotations

from collections.abc import Iterator
from math import exp
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase


def perplexity(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Dataset,
    max_length: int | None = None,
) -> float:
    """exp of the mean loss over all answer tokens of `examples`; the same loss that training reports."""
    return exp(mean_loss(answer_losses(model, tokenizer, examples, max_length)))


def mean_loss(losses: list[tuple[float, int]]) -> float:
    """Per token, so that long answers count for more than short ones."""
    return sum(total for total, _ in losses) / max(1, sum(tokens for _, tokens in losses))


@torch.inference_mode()
def answer_losses(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, examples: Any, max_length: int | None = None
) -> list[tuple[float, int]]:
    """(summed loss, tokens) of each example's answer; of the whole text where there is only `text`.

    One example at a time, and the vocabulary only where the answer is: no padding, and little memory on any card.

    Args:
        examples: `prompt` and `completion` messages, or `text`: a Dataset, or a list of such rows.
        max_length: cut examples to so many tokens, as training does.
    """
    losses = []
    for ids, start, logits in _answers(model, tokenizer, examples, max_length):
        losses.append(
            (cross_entropy(logits.float(), ids[start:], reduction="sum").item(), len(ids) - start)
            if len(logits)
            else (0.0, 0)
        )
    return losses


@torch.inference_mode()
def greedy_tokens(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, examples: Any
) -> list[list[int]]:
    """What the model would choose at each position of the given answers: two models that agree here say the same.

    Answers that were generated freely would differ in everything after their first different token.
    """
    return [logits.argmax(-1).tolist() for _, _, logits in _answers(model, tokenizer, examples, None)]


def _answers(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, examples: Any, max_length: int | None
) -> Iterator[tuple[torch.Tensor, int, torch.Tensor]]:
    """(token ids, where the trained ones start, the logits that predict those) of each example."""
    was_training = model.training
    model.eval()
    try:
        for example in examples:
            tokens, start = _tokens(tokenizer, example)
            ids = torch.tensor(tokens[:max_length], device=model.device)
            count = max(0, len(ids) - start)
            if count:
                logits = model(input_ids=ids[None], logits_to_keep=count + 1).logits[0, -count - 1 : -1]
            yield ids, start, logits if count else torch.empty(0, device=model.device)
    finally:
        model.train(was_training)


def _tokens(tokenizer: PreTrainedTokenizerBase, example: dict[str, Any]) -> tuple[list[int], int]:
    """(token ids, where the trained ones start). The first token of a text is never predicted, so it does not count."""
    if "text" in example:
        ids = tokenizer(example["text"])["input_ids"]
        return (ids if ids[-1:] == [tokenizer.eos_token_id] else [*ids, tokenizer.eos_token_id]), 1
    prompt = tokenizer.apply_chat_template(example["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
    whole = tokenizer.apply_chat_template([*example["prompt"], *example["completion"]], return_dict=True)["input_ids"]
    return whole, len(prompt)

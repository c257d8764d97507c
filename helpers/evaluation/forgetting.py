"""Did it forget? How strange the model now finds what it used to say about everything else.

    print(forgetting_check(model, tokenizer))

No reference answers are needed: without its adapter, the model answers a dozen general prompts; then the loss of those very answers is
measured without and with the adapter. Unchanged behaviour gives the same loss. A rise by 0.7 means that each of its old words has become
half as likely (exp(-0.7) = 0.5).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp

import pandas as pd
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from helpers.evaluation.answers import answer
from helpers.evaluation.losses import answer_losses, mean_loss

LITTLE, MUCH = 0.1, 0.7  # nats per token: each old word a tenth less likely; half as likely

GENERAL_PROMPTS = [
    "Why does the sky turn red in the evening?",
    "What is the capital of Portugal, and on which river does it lie?",
    "Explain to a ten-year-old what a fraction is.",
    "A train leaves at 14:35 and arrives at 17:10. How long does it travel?",
    "Translate into Spanish: The library is closed on Mondays.",
    "Write a Python function that returns the largest number in a list.",
    "Name three differences between a frog and a toad.",
    "Summarise the story of Little Red Riding Hood in two sentences.",
    "Write four lines of verse about a lighthouse.",
    "What should I check before I buy a used bicycle?",
    "Is it healthy to drink only fruit juice for a week? Explain briefly.",
    "List the planets of the solar system from the sun outwards.",
]  # ours, CC0; far from the data samples on purpose


@dataclass(frozen=True)
class Forgetting:
    """`before` and `after` are the losses per token of the model's own old answers; `table` has both answers to read."""

    before: float
    after: float
    table: pd.DataFrame

    @property
    def rise(self) -> float:
        return self.after - self.before

    def __str__(self) -> str:
        where = f"on {len(self.table)} general prompts, its own old words are now {exp(self.rise):.2g} times less likely each"
        losses = f"(loss {self.before:.2f} -> {self.after:.2f})"
        if self.rise < LITTLE:
            return f"hardly anything forgotten: on {len(self.table)} general prompts, it would still say what it said before {losses}"
        if self.rise < MUCH:
            return f"some change elsewhere: {where} {losses}"
        return f"it now speaks differently about everything: {where} {losses}. Fewer steps, a lower learning rate, or general examples among your own help"


def forgetting_check(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str] | None = None,
    max_new_tokens: int = 60,
    batch_size: int = 12,
) -> Forgetting:
    """Compare what the model says to general prompts without and with its adapter.

    Args:
        prompts: questions of yours, if there is something in particular that it must not forget.
    """
    asked = [[{"role": "user", "content": prompt}] for prompt in (prompts or GENERAL_PROMPTS)]
    with model.disable_adapter():
        before = answer(model, tokenizer, asked, max_new_tokens, batch_size)
    examples = [
        {"prompt": prompt, "completion": [{"role": "assistant", "content": text}]}
        for prompt, text in zip(asked, before)
    ]
    with model.disable_adapter():
        old = answer_losses(model, tokenizer, examples)
    new = answer_losses(model, tokenizer, examples)
    table = pd.DataFrame(
        {
            "prompt": [prompt[0]["content"] for prompt in asked],
            "before": before,
            "after": answer(model, tokenizer, asked, max_new_tokens, batch_size),
            "before_loss": [total / max(1, tokens) for total, tokens in old],
            "after_loss": [total / max(1, tokens) for total, tokens in new],
        }
    )
    return Forgetting(mean_loss(old), mean_loss(new), table)

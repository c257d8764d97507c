"""Before and after: what the model answers without the adapter, and what it answers with it.

table = compare_before_after(model, tokenizer, validation, score=follows_house_style)
table[["before_score", "after_score"]].mean()
"""

from __future__ import annotations

import html

import pandas as pd
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from helpers.evaluation.scores import Score, scored
from helpers.models import Messages, free_memory, generate


def compare_before_after(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Dataset,
    score: Score | None = None,
    max_new_tokens: int = 128,
    batch_size: int = 48,
) -> pd.DataFrame:
    """Greedy answers to the prompts of `examples`, with the adapter switched off (`before`) and on (`after`).

    The same model answers twice, so no second copy is in memory. One row per example: `prompt`, `reference`, `before`, `after`, and
    with `score` (higher is better) `before_score` and `after_score`.

    Args:
        score: a function of the answer, or of the answer and the reference.
        batch_size: prompts that are answered at once: on a GPU, pass the plan's `generation_batch`.
    """
    if "prompt" not in examples.column_names:
        raise ValueError(
            "These examples are plain text, with no question to answer: judge them by perplexity(model, tokenizer, examples)."
        )
    prompts = list(examples["prompt"])
    with model.disable_adapter():
        before = answer(model, tokenizer, prompts, max_new_tokens, batch_size)
    table = pd.DataFrame(
        {
            "prompt": [messages[-1]["content"] for messages in prompts],
            "reference": [messages[-1]["content"] for messages in examples["completion"]],
            "before": before,
            "after": answer(model, tokenizer, prompts, max_new_tokens, batch_size),
        }
    )
    if score is not None:
        for when in ("before", "after"):
            table[f"{when}_score"] = scored(score, table[when], table["reference"])
    return table


def answer(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, prompts: list[Messages], max_new_tokens: int, batch_size: int
) -> list[str]:
    """Greedy answers; a batch that is too large for the card is halved, which changes nothing but the time."""
    while True:
        try:
            return generate(model, tokenizer, prompts, max_new_tokens, batch_size)
        except torch.OutOfMemoryError:
            if batch_size == 1:
                raise
        free_memory()  # here, because the exception held what the batch had filled
        batch_size = -(-batch_size // 2)
        print(f"Out of memory while answering: {batch_size} prompts at a time from now on.")


def worst_first(table: pd.DataFrame) -> pd.DataFrame:
    """A comparison with the examples to look at on top: lowest score after training, then what became worse, then highest loss."""
    keys = pd.DataFrame(index=table.index)
    if "after_score" in table:
        keys["score"] = table["after_score"]
        keys["gained"] = table["after_score"] - table["before_score"]
    if "after_loss" in table:
        keys["loss"] = -table["after_loss"]
    return table.loc[keys.sort_values(list(keys), kind="stable").index] if len(keys.columns) else table


def side_by_side(table: pd.DataFrame, rows: int = 3) -> str:
    """The first `rows` of a comparison as an HTML table: prompt, before, after. Readable in light and dark themes."""
    cell = "<td style='text-align:left;vertical-align:top;white-space:pre-wrap;padding:8px;width:{}'>{}</td>"
    widths = {"prompt": "24%", "before": "38%", "after": "38%"}
    head = "".join(f"<th style='text-align:left;padding:8px'>{name}</th>" for name in widths)
    body = "".join(
        "<tr>" + "".join(cell.format(width, html.escape(str(row[name]))) for name, width in widths.items()) + "</tr>"
        for _, row in table.head(rows).iterrows()
    )
    return f"<table style='width:100%;table-layout:fixed'><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

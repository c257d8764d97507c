"""Before and after: what the model answered without the adapter, and what it answers with it.

table = compare_before_after(model, tokenizer, validation, score=follows_house_style)
table[["before_score", "after_score"]].mean()
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable

import pandas as pd
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from helpers.models import generate

# The five lines that every answer of the fictional shop in data_samples/customer_support.jsonl has.
HOUSE_STYLE = re.compile(
    r"Hello \S+,\n"
    r"I hear you: .+\n"
    r"We will: .+\n"
    r"You can: .+\n"
    r"Warmly, Wren at Copperleaf"
)


def follows_house_style(answer: str) -> bool:
    """Does the whole answer have the five lines of Copperleaf's house style, in order and with nothing around them?"""
    return HOUSE_STYLE.fullmatch(answer) is not None


def compare_before_after(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Dataset,
    score: Callable[[str], float] | None = None,
    max_new_tokens: int = 128,
    batch_size: int = 48,
) -> pd.DataFrame:
    """Greedy answers to the prompts of `examples`, with the adapter switched off (`before`) and on (`after`).

    `batch_size` prompts are answered at once: on a GPU, pass the plan's `generation_batch`. The same model answers twice, so no second copy is in memory. One row per example: `prompt`, `reference`, `before`,
    `after`, and with `score` (a function of the answer, higher is better) `before_score` and `after_score`.
    """
    prompts = list(examples["prompt"])
    with model.disable_adapter():
        before = generate(model, tokenizer, prompts, max_new_tokens, batch_size)
    table = pd.DataFrame(
        {
            "prompt": [messages[-1]["content"] for messages in prompts],
            "reference": [messages[-1]["content"] for messages in examples["completion"]],
            "before": before,
            "after": generate(model, tokenizer, prompts, max_new_tokens, batch_size),
        }
    )
    if score is not None:
        table["before_score"] = table["before"].map(score).astype(float)
        table["after_score"] = table["after"].map(score).astype(float)
    return table


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

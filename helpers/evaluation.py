"""Is it better? Before and after on held-out prompts, with numbers that say how sure one can be.

    evaluation = evaluate(run, tokenizer, validation, score=follows_house_style)
    print(evaluation)               # better on 41 of 60, worse on 7, p = 0.0001; perplexity; what was forgotten
    evaluation.save()               # evaluation.jsonl and run_report.html in the run folder

    table = compare_before_after(model, tokenizer, validation, score=follows_house_style)     # only the answers
    HTML(side_by_side(worst_first(table)))

A score is any function of the answer, or of the answer and the reference; higher is better.

Before and after: what the model answers without the adapter, and what it answers with it.

table = compare_before_after(model, tokenizer, validation, score=follows_house_style)
table[["before_score", "after_score"]].mean()

The loss of given answers, and perplexity: how surprised is the model by what it should say?

perplexity(model, tokenizer, validation)      # exp(loss per answer token); 1 is certainty, the vocabulary's size is guessing

Did it forget? How strange the model now finds what it used to say about everything else.

    print(forgetting_check(model, tokenizer))

No reference answers are needed: without its adapter, the model answers a dozen general prompts; then the loss of those very answers is
measured without and with the adapter. Unchanged behavior gives the same loss. A rise by 0.7 means that each of its old words has become
half as likely (exp(-0.7) = 0.5).

The whole judgment of a run in one call: answers, scores, losses, and what was forgotten.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import exp
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from datasets import Dataset
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from helpers.checkpoints import atomic_write
from helpers.data.tokens import tokenize
from helpers.metrics import PairedTest, Score, bootstrap_interval, paired_test, scored
from helpers.models import Messages, free_memory, generate
from helpers.runs import Run


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
        for tokens in tokenize(examples, tokenizer):
            start = max(1, len(tokens.ids) - tokens.trained)  # the first token of a text is never predicted
            ids = torch.tensor(tokens.ids[:max_length], device=model.device)
            count = max(0, len(ids) - start)
            if count:
                logits = model(input_ids=ids[None], logits_to_keep=count + 1).logits[0, -count - 1 : -1]
            yield ids, start, logits if count else torch.empty(0, device=model.device)
    finally:
        model.train(was_training)


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


EXAMPLES = 48  # as many as the quickstart compares


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found. `table` has one row per held-out example; the losses are per answer token."""

    run: Run
    table: pd.DataFrame
    score_name: str
    loss_before: float
    loss_after: float
    forgetting: Forgetting | None = None

    @property
    def test(self) -> PairedTest:
        """Paired over examples: by score where there is one, else by the loss of the reference."""
        if "after_score" in self.table:
            return paired_test(self.table["before_score"], self.table["after_score"])
        return paired_test(-self.table["before_loss"], -self.table["after_loss"])

    @property
    def sentences(self) -> list[str]:
        said = []
        if "after_score" in self.table:
            said.append(
                f"{self.score_name}: {_share(self.table['before_score'])} before, {_share(self.table['after_score'])} after"
            )
        what = "" if "after_score" in self.table else " by the loss of the reference answers"
        said.append(f"{self.test}{what}")
        said.append(
            f"perplexity of the reference answers: {exp(self.loss_before):.1f} before, {exp(self.loss_after):.1f} after "
            f"(loss per token {self.loss_before:.3f} -> {self.loss_after:.3f})"
        )
        return said + ([str(self.forgetting)] if self.forgetting else [])

    def __str__(self) -> str:
        return "\n".join(f"- {sentence}" for sentence in self.sentences)

    def save(self) -> Path:
        """Write `evaluation.jsonl` (every answer, worst first) and `run_report.html` into the run folder; returns the report."""
        rows = worst_first(self.table).to_json(orient="records", lines=True, force_ascii=False)
        atomic_write(self.run.folder / "evaluation.jsonl", rows.rstrip("\n") + "\n")
        atomic_write(self.run.folder / "evaluation.json", json.dumps(self.summary(), indent=2, ensure_ascii=False))
        from helpers.export.report import write_report

        return write_report(self.run, self)

    def summary(self) -> dict[str, Any]:
        """The numbers alone, as plain values."""
        numbers = {"examples": len(self.table), "loss_before": self.loss_before, "loss_after": self.loss_after}
        numbers |= {"better": self.test.better, "worse": self.test.worse, "p": self.test.p}
        for when in ("before", "after"):
            if f"{when}_score" in self.table:
                scores = self.table[f"{when}_score"]
                numbers[f"{self.score_name} {when}"] = {
                    "mean": float(scores.mean()),
                    "interval": bootstrap_interval(scores),
                }
        if self.forgetting:
            numbers |= {"general_loss_before": self.forgetting.before, "general_loss_after": self.forgetting.after}
        return numbers


def evaluate(
    run: Run,
    tokenizer: PreTrainedTokenizerBase,
    examples: Dataset,
    score: Score | None = None,
    score_name: str = "",
    max_new_tokens: int = 128,
    batch_size: int = 48,
    forgetting: bool = True,
    general_prompts: Sequence[str] | None = None,
) -> Evaluation:
    """Judge the model of `run` on held-out examples, with its adapter off and on.

    Args:
        examples: held out; the first 48 are used. Choose others with `.select`.
        score: a function of the answer, or of the answer and the reference; higher is better.
        batch_size: on a GPU, pass the plan's `generation_batch`.
        forgetting: also ask a dozen general questions, or `general_prompts`.

    Raises:
        ValueError: the run's model is not in memory, or the examples have no prompts.
    """
    if run.model is None:
        raise ValueError(
            f"The model of {run.folder} is not in memory: run its train cell (it finds the finished run), or set "
            "run.model = load_adapter(run.adapter, model)."
        )
    model, examples = run.model, examples.select(range(min(EXAMPLES, len(examples))))
    table = compare_before_after(model, tokenizer, examples, score, max_new_tokens, batch_size)
    longest = run.plan.get("seq_len", run.settings["max_length"])  # as many tokens as training saw
    with model.disable_adapter():
        before = answer_losses(model, tokenizer, examples, longest)
    after = answer_losses(model, tokenizer, examples, longest)
    for when, losses in (("before", before), ("after", after)):
        table[f"{when}_loss"] = [total / max(1, tokens) for total, tokens in losses]
    forgotten = forgetting_check(model, tokenizer, list(general_prompts or []) or None) if forgetting else None
    name = score_name or getattr(score, "__name__", "score").replace("_", " ")
    return Evaluation(run, table, name, mean_loss(before), mean_loss(after), forgotten)


def _share(values: pd.Series) -> str:
    low, high = bootstrap_interval(values)
    if values.between(0, 1).all():
        return f"{values.mean():.0%} (95 % interval {low:.0%} to {high:.0%})"
    return f"{values.mean():.3g} (95 % interval {low:.3g} to {high:.3g})"

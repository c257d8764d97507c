"""Is it better? Before and after on held-out prompts, with numbers that say how sure one can be.

    evaluation = evaluate(run, tokenizer, validation, score=follows_house_style)
    print(evaluation)               # better on 41 of 60, worse on 7, p < 0.0001; perplexity; what was forgotten
    evaluation.save()               # evaluation.jsonl and evaluation.json in the run folder
    HTML(side_by_side(worst_first(evaluation.table)))

Each part can be had alone: `compare_before_after` (answers), `perplexity` (how surprising are the right answers?) and
`forgetting_check` (does the model still say what it used to say about everything else?).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import exp
from pathlib import Path
from typing import Any, TypeAlias

import pandas as pd
import torch
from datasets import Dataset
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from helpers.data.tokens import tokenize
from helpers.disk import writing
from helpers.files import atomic_write
from helpers.guards import check_run
from helpers.metrics import PairedTest, Score, bootstrap_interval, paired_test, scored
from helpers.models import Messages, free_memory, generate
from helpers.runs import Run

Model: TypeAlias = PreTrainedModel | PeftModel
Losses = list[tuple[float, int]]  # (summed loss, tokens) of each answer
EXAMPLES = 48  # as many as the quickstart compares
LITTLE, MUCH = 0.1, 0.7  # rise in nats per token: exp(-0.1) = 0.9 times as likely, exp(-0.7) = half as likely
# Ours, CC0; far from the data samples on purpose
GENERAL_PROMPTS = Path(__file__).with_name("general_prompts.txt").read_text(encoding="utf-8").splitlines()


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
        """Scores with their intervals, how many became better, perplexity, what was forgotten."""
        if "after_score" in self.table:
            before, after = (_share(self.table[f"{when}_score"]) for when in ("before", "after"))
            said = [f"{self.score_name}: {before} before, {after} after", f"{self.test}"]
        else:
            said = [f"{self.test} by the loss of the reference answers"]
        said.append(
            f"perplexity of the reference answers: {exp(self.loss_before):.1f} before, {exp(self.loss_after):.1f} after "
            f"(loss per token {self.loss_before:.3f} -> {self.loss_after:.3f})"
        )
        return said + ([str(self.forgetting)] if self.forgetting else [])

    def __str__(self) -> str:
        return "\n".join(f"- {sentence}" for sentence in self.sentences)

    def save(self) -> None:
        """Write `evaluation.jsonl` (every answer, worst first) and `evaluation.json` (the numbers) into the run folder (`ExportError`: cannot)."""
        rows = worst_first(self.table).to_json(orient="records", lines=True, force_ascii=False)
        with writing(self.run.folder):
            atomic_write(self.run.folder / "evaluation.jsonl", rows.rstrip("\n") + "\n")
            atomic_write(self.run.folder / "evaluation.json", json.dumps(self.summary(), indent=2, ensure_ascii=False))

    def summary(self) -> dict[str, Any]:
        """The numbers alone, as plain values."""
        numbers: dict[str, Any] = {"examples": len(self.table)}
        numbers |= {"loss_before": self.loss_before, "loss_after": self.loss_after}
        numbers |= {"better": self.test.better, "worse": self.test.worse, "p": self.test.p}
        for when in ("before", "after") if "after_score" in self.table else ():
            values = self.table[f"{when}_score"]
            mean = float(values.mean())
            numbers[f"{self.score_name} {when}"] = {"mean": mean, "interval": bootstrap_interval(values)}
        if self.forgetting:
            numbers |= {"general_loss_before": self.forgetting.before, "general_loss_after": self.forgetting.after}
        return numbers


def evaluate(
    run: Run,
    tokenizer: Tokenizer,
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
        score, max_new_tokens, batch_size: as for `compare_before_after`.
        forgetting: also ask a dozen general questions, or `general_prompts`.

    Raises:
        ValueError: the run's model is not in memory, or the examples have no prompts.
        ConfigError: the model or the examples are not of this run.
    """
    check_run(run, examples)
    model, examples = run.model, examples.select(range(min(EXAMPLES, len(examples))))
    table = compare_before_after(model, tokenizer, examples, score, max_new_tokens, batch_size)
    longest = run.plan.get("seq_len", run.settings["max_length"])  # as many tokens as training saw
    before, after = _before_after(model, lambda: answer_losses(model, tokenizer, examples, longest))
    table["before_loss"], table["after_loss"] = _per_token(before), _per_token(after)
    forgotten = forgetting_check(model, tokenizer, general_prompts) if forgetting else None
    name = score_name or getattr(score, "__name__", "score").replace("_", " ")
    return Evaluation(run, table, name, mean_loss(before), mean_loss(after), forgotten)


def _share(values: pd.Series) -> str:
    low, high = bootstrap_interval(values)
    form = ".0%" if values.between(0, 1).all() else ".3g"
    return f"{values.mean():{form}} (95 % interval {low:{form}} to {high:{form}})"


def _before_after(model: PeftModel, measure: Callable[[], Any]) -> tuple[Any, Any]:
    """`measure()` with the adapter off, and with it on: the same model twice, so no second copy is in memory."""
    with model.disable_adapter():
        before = measure()
    return before, measure()


def compare_before_after(
    model: PeftModel,
    tokenizer: Tokenizer,
    examples: Dataset,
    score: Score | None = None,
    max_new_tokens: int = 128,
    batch_size: int = 48,
) -> pd.DataFrame:
    """Greedy answers to the prompts of `examples`, with the adapter switched off (`before`) and on (`after`).

    One row per example: `prompt`, `reference`, `before`, `after`, and with `score` also `before_score` and `after_score`.

    Args:
        score: a function of the answer, or of the answer and the reference; higher is better.
        batch_size: prompts that are answered at once: on a GPU, pass the plan's `generation_batch`.
    """
    if "prompt" not in examples.column_names:
        raise ValueError("No questions in these examples: judge them by perplexity(model, tokenizer, examples).")
    prompts = list(examples["prompt"])
    before, after = _before_after(model, lambda: answer(model, tokenizer, prompts, max_new_tokens, batch_size))
    asked, wanted = ([messages[-1]["content"] for messages in examples[name]] for name in ("prompt", "completion"))
    table = pd.DataFrame({"prompt": asked, "reference": wanted, "before": before, "after": after})
    if score is not None:
        table["before_score"], table["after_score"] = scored(score, before, wanted), scored(score, after, wanted)
    return table


def answer(
    model: PeftModel, tokenizer: Tokenizer, prompts: list[Messages], max_new_tokens: int, batch_size: int
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
    gained = table.get("after_score", 0) - table.get("before_score", 0)
    ranked = table.assign(gained=gained, likelihood=-table.get("after_loss", 0))
    keys = [key for key in ("after_score", "gained", "likelihood") if key in ranked]
    return table.loc[ranked.sort_values(keys).index]


def side_by_side(table: pd.DataFrame, rows: int = 3) -> str:
    """The first `rows` of a comparison as an HTML table: prompt, before, after. Readable in light and dark themes."""
    css = "text-align:left; vertical-align:top; white-space:pre-wrap; padding:8px"
    shown = table.head(rows)[["prompt", "before", "after"]].style.hide(axis="index").format(escape="html")
    shown = shown.set_table_styles([{"selector": cell, "props": css} for cell in ("th", "td")])
    with pd.option_context("styler.html.mathjax", False):  # a dollar is a dollar, in Jupyter too
        return shown.set_table_attributes("style='width:100%; table-layout:fixed'").to_html()


def perplexity(model: Model, tokenizer: Tokenizer, examples: Dataset, max_length: int | None = None) -> float:
    """exp of the loss per answer token, as training reports it: 1 is certainty, the vocabulary's size is guessing."""
    return exp(mean_loss(answer_losses(model, tokenizer, examples, max_length)))


def mean_loss(losses: Losses) -> float:
    """Per token, so that long answers count for more than short ones."""
    return sum(total for total, _ in losses) / max(1, sum(tokens for _, tokens in losses))


def _per_token(losses: Losses) -> list[float]:
    return [total / max(1, tokens) for total, tokens in losses]


@torch.inference_mode()
def answer_losses(model: Model, tokenizer: Tokenizer, examples: Any, max_length: int | None = None) -> Losses:
    """(summed loss, tokens) of each example's answer; of the whole text where there is only `text`.

    One example at a time, and the vocabulary only where the answer is: no padding, and little memory on any card.

    Args:
        examples: `prompt` and `completion` messages, or `text`: a Dataset, or a list of such rows.
        max_length: cut examples to so many tokens, as training does.
    """
    answers = _answers(model, tokenizer, examples, max_length)
    return [(cross_entropy(logits.float(), ids, reduction="sum").item(), len(ids)) for ids, logits in answers]


@torch.inference_mode()
def greedy_tokens(model: Model, tokenizer: Tokenizer, examples: Any) -> list[list[int]]:
    """What the model would choose at each position of the given answers: two models that agree here say the same.

    Answers that were generated freely would differ in everything after their first different token.
    """
    return [logits.argmax(-1).tolist() for _, logits in _answers(model, tokenizer, examples, None)]


def _answers(
    model: Model, tokenizer: Tokenizer, examples: Any, max_length: int | None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(token ids of the answer, the logits that predict them) of each example; both are empty if the answer was cut away."""
    was_training = model.training
    model.eval()
    try:
        for example in tokenize(examples, tokenizer):
            start = max(1, len(example.ids) - example.trained)  # the first token of a text is never predicted
            ids = torch.tensor(example.ids[:max_length], device=model.device)
            count = max(0, len(ids) - start)
            logits = model(input_ids=ids[None], logits_to_keep=count + 1).logits[0]
            yield ids[start:], logits[-count - 1 : -1]
    finally:
        model.train(was_training)


@dataclass(frozen=True)
class Forgetting:
    """`before` and `after` are the losses per token of the model's own old answers; `table` has both answers to read."""

    before: float
    after: float
    table: pd.DataFrame

    @property
    def rise(self) -> float:
        """In nats per token."""
        return self.after - self.before

    def __str__(self) -> str:
        losses = f"(loss {self.before:.2f} -> {self.after:.2f})"
        where = f"on {len(self.table)} general prompts"
        if self.rise < LITTLE:
            return f"hardly anything forgotten: {where}, it would still say what it said before {losses}"
        where += f", its own old words are now {exp(self.rise):.2g} times less likely each {losses}"
        if self.rise < MUCH:
            return f"some change elsewhere: {where}"
        return f"much forgotten: {where}. Fewer steps, a lower learning rate, or general examples among your own help"


def forgetting_check(
    model: PeftModel, tokenizer: Tokenizer, prompts: Sequence[str] | None = None, max_new_tokens: int = 60
) -> Forgetting:
    """How strange the model now finds what it used to say about everything else. No reference answers are needed.

    Without its adapter, the model answers a dozen general prompts; then the loss of those very answers is measured without and
    with the adapter. Unchanged behavior gives the same loss.

    Args:
        prompts: questions of yours, if there is something in particular that it must not forget.
    """
    asked = [[{"role": "user", "content": prompt}] for prompt in prompts or GENERAL_PROMPTS]
    before, after = _before_after(model, lambda: answer(model, tokenizer, asked, max_new_tokens, batch_size=12))
    examples = [
        {"prompt": prompt, "completion": [{"role": "assistant", "content": text}]}
        for prompt, text in zip(asked, before)
    ]
    old, new = _before_after(model, lambda: answer_losses(model, tokenizer, examples))
    table = pd.DataFrame({"prompt": list(prompts or GENERAL_PROMPTS), "before": before, "after": after})
    table["before_loss"], table["after_loss"] = _per_token(old), _per_token(new)
    return Forgetting(mean_loss(old), mean_loss(new), table)

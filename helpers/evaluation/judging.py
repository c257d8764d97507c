"""The whole judgement of a run in one call: answers, scores, losses, and what was forgotten."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import exp
from pathlib import Path
from typing import Any

import pandas as pd
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from helpers.checkpoints import write_whole
from helpers.evaluation.answers import compare_before_after, worst_first
from helpers.evaluation.forgetting import Forgetting, forgetting_check
from helpers.evaluation.losses import answer_losses, mean_loss
from helpers.evaluation.report import write_report
from helpers.evaluation.scores import Score
from helpers.evaluation.statistics import PairedTest, bootstrap_interval, paired_test
from helpers.runs import Run

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
        write_whole(self.run.folder / "evaluation.jsonl", rows.rstrip("\n") + "\n")
        write_whole(self.run.folder / "evaluation.json", json.dumps(self.summary(), indent=2, ensure_ascii=False))
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

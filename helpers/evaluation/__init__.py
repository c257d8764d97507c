"""Is it better? Before and after on held-out prompts, with numbers that say how sure one can be.

    evaluation = evaluate(run, tokenizer, validation, score=follows_house_style)
    print(evaluation)               # better on 41 of 60, worse on 7, p = 0.0001; perplexity; what was forgotten
    evaluation.save()               # evaluation.jsonl and run_report.html in the run folder

    table = compare_before_after(model, tokenizer, validation, score=follows_house_style)     # only the answers
    HTML(side_by_side(worst_first(table)))

A score is any function of the answer, or of the answer and the reference; higher is better.
"""

from helpers.evaluation.answers import compare_before_after, side_by_side, worst_first
from helpers.evaluation.code import passes_assertions
from helpers.evaluation.forgetting import GENERAL_PROMPTS, Forgetting, forgetting_check
from helpers.evaluation.judging import Evaluation, evaluate
from helpers.evaluation.losses import answer_losses, perplexity
from helpers.evaluation.report import write_report
from helpers.evaluation.scores import exact_match, follows_house_style, rouge_l, token_f1
from helpers.evaluation.statistics import PairedTest, bootstrap_interval, paired_test

__all__ = [
    "GENERAL_PROMPTS",
    "Evaluation",
    "Forgetting",
    "PairedTest",
    "answer_losses",
    "bootstrap_interval",
    "compare_before_after",
    "evaluate",
    "exact_match",
    "follows_house_style",
    "forgetting_check",
    "paired_test",
    "passes_assertions",
    "perplexity",
    "rouge_l",
    "side_by_side",
    "token_f1",
    "worst_first",
    "write_report",
]

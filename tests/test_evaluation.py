"""Scores, losses and the judgment of a run, on the tiny model; what reaches the disk and the page."""

import json
import math
import re
from dataclasses import asdict
from html import escape

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset

from helpers import evaluation as ev
from helpers import metrics
from helpers.config import TrainConfig
from helpers.export import write_report
from helpers.hardware import GIB
from helpers.models import attach_lora
from helpers.runs import Run
from helpers.train import train

WHEN = ("before", "after")


@pytest.fixture
def recorded(tmp_path):
    """A run of which only the record is there."""
    history = [{"step": 0, "eval_loss": 4.0}, {"step": 9, "loss": 3.0, "seconds": 90.0}, {"step": 9, "eval_loss": 2.87}]
    plan = {"card": "Tesla T4", "peak_bytes": 3 * GIB, "training_examples": 48}
    return Run(tmp_path, "id", asdict(TrainConfig(data="<b>.json")), plan=plan, history=history)


def test_losses_count_every_token_of_plain_text_but_the_first_and_nothing_of_an_answer_that_is_cut_away(job):
    model, tokenizer = job["model"], job["tokenizer"]
    text = "plain text"
    [(loss, tokens)] = ev.answer_losses(model, tokenizer, Dataset.from_list([{"text": text}]))
    ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
    with torch.no_grad():
        expected = model(input_ids=ids, labels=ids).loss.item()
    assert tokens == ids.shape[1] - 1 and loss / tokens == pytest.approx(expected, abs=1e-5)
    assert set(ev.answer_losses(model, tokenizer, job["validation"], max_length=5)) == {(0.0, 0)}


def test_a_fresh_adapter_has_forgotten_nothing(job):
    model = attach_lora(job["model"], job["config"])
    forgotten = ev.forgetting_check(model, job["tokenizer"], ["What is 2 plus 2?", "Who are you?"], max_new_tokens=8)
    assert forgotten.rise == pytest.approx(0, abs=1e-6) and "hardly anything forgotten" in str(forgotten)
    assert list(forgotten.table["before"]) == list(forgotten.table["after"])


def test_a_trained_adapter_is_judged_and_saved(job, tmp_path, say):
    run = train(**job, root=tmp_path)
    general = ["What is water?", "Who was Ada?"]
    settings = {"score": metrics.token_f1, "max_new_tokens": 24, "general_prompts": general}
    result = ev.evaluate(run, job["tokenizer"], job["validation"], **settings)
    reported = [run.first_eval_loss, run.best_eval_loss]  # by training
    assert [result.loss_before, result.loss_after] == pytest.approx(reported, abs=1e-5) and reported[1] < reported[0]
    best = ev.perplexity(run.model, job["tokenizer"], job["validation"], max_length=128)
    assert math.log(best) == pytest.approx(run.best_eval_loss, abs=1e-5)
    assert result.forgetting.rise > 0.1 and "hardly" not in str(result.forgetting)
    assert len(result.sentences) == 4 and "token f1:" in str(result) and "95 % interval" in str(result)

    result.save()
    assert not (run.folder / "run_report.html").exists()
    rows = [json.loads(line) for line in (run.folder / "evaluation.jsonl").read_text(encoding="utf-8").splitlines()]
    columns = {"prompt", "reference"} | {f"{when}{what}" for when in WHEN for what in ("", "_score", "_loss")}
    assert len(rows) == len(job["validation"]) and set(rows[0]) == columns
    assert [row["after_score"] for row in rows] == sorted(row["after_score"] for row in rows)  # worst first
    numbers = json.loads((run.folder / "evaluation.json").read_text())
    assert numbers["loss_after"] == result.loss_after
    assert numbers["token f1 after"]["mean"] == result.table["after_score"].mean()

    page = write_report(run, result)
    assert page == run.folder / "run_report.html" and not (run.folder / "report.html").exists()
    text = page.read_text(encoding="utf-8")
    assert all(escape(sentence) in text for sentence in result.sentences) and "Everything else" in text
    say(f"run_report.html: {page.stat().st_size / 1024:.0f} KiB")

    unscored = ev.evaluate(run, job["tokenizer"], job["validation"], max_new_tokens=4, forgetting=False)
    assert unscored.test.better == len(job["validation"]) and unscored.test.clear
    assert "by the loss of the reference answers" in str(unscored)


def test_the_report_is_one_file_that_asks_nothing_of_the_network_and_runs_nothing(recorded):
    nasty = "<script>alert(1)</script> & <b>"
    recorded.settings["model"] = nasty
    numbers = {"before_score": 0.0, "after_score": 1.0, "before_loss": 2.0, "after_loss": 1.0}
    table = pd.DataFrame(dict.fromkeys(["prompt", "reference", *WHEN], [nasty] * 8)).assign(**numbers)
    forgotten = ev.Forgetting(1.0, 1.0, table.drop(columns=["reference", "before_score", "after_score"]))
    evaluation = ev.Evaluation(recorded, table, "style <i>", 2.0, 1.0, forgotten)
    page = write_report(recorded, evaluation).read_text(encoding="utf-8")
    assert page.count("&lt;script&gt;") == 8 * 4 + 3 * 3 + 2  # eight answers, three of the old ones, the model twice
    shown = ev.side_by_side(table, rows=8)
    assert shown.count("&lt;script&gt;") == 8 * 3 and "mathjax_ignore" in shown
    assert not re.search("<script|<b>|<i>|https?://", page + shown)
    for there in ("3.00 GiB", "Tesla T4", "4.00 → 2.87", "0% → 100%", "learning_rate", 'src="data:image/png;base64,'):
        assert there in page
    titles = ["Curves", "Plan and reality", "Worst first", "And the best", "Everything else", "Settings"]
    assert re.findall("<h2>(.*)</h2>", page) == titles and "color-scheme: light dark" in page
    unfinished = write_report(recorded).read_text(encoding="utf-8")
    assert "Not finished." in unfinished and "Worst first" not in unfinished, "needs no evaluation"


def test_what_cannot_be_judged_is_refused_with_what_can_be_done(recorded):
    with pytest.raises(ValueError, match=r"not in memory.*load_adapter"):
        ev.evaluate(recorded, None, None)
    with pytest.raises(ValueError, match="perplexity"):
        ev.compare_before_after(None, None, Dataset.from_list([{"text": "a"}]))


def test_a_batch_that_is_too_large_is_halved_until_it_fits(monkeypatch, capsys):
    asked = []

    def only_three_fit(model, tokenizer, prompts, max_new_tokens, batch_size):
        asked.append(batch_size)
        if batch_size > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return ["yes"] * len(prompts)

    monkeypatch.setattr(ev, "generate", only_three_fit)
    assert ev.answer(None, None, [[]] * 10, 5, 10) == ["yes"] * 10 and asked == [10, 5, 3]
    assert "Out of memory while answering: 3 prompts" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [  # as Google's package rouge-score 0.1.2 has them (rougeL, fmeasure, without stemming)
        ("police killed the gunman", "police kill the gunman", 0.75),
        ("the gunman kill police", "police kill the gunman", 0.5),
        ("The cat sat on the mat.", "The cat was sitting on a red mat.", 0.571428571),
        ("nothing in common", "other words only", 0.0),
        ("same, same!", "Same same", 1.0),
    ],
)
def test_rouge_l_is_googles(answer, reference, expected):
    assert metrics.rouge_l(answer, reference) == pytest.approx(expected, abs=1e-6)


def test_token_f1_ignores_order_and_counts_repeats_once_each():
    assert metrics.token_f1("b a", "a b") == 1 and metrics.token_f1("a a a", "a b") == pytest.approx(0.4)
    assert metrics.token_f1("", "a") == 0 and metrics.token_f1("", "") == 1
    assert metrics.token_f1("Grüße, 世界", "grüße 世界!") == 1  # any alphabet


def test_a_score_may_take_the_answer_or_the_answer_and_the_reference():
    assert metrics.scored(len, ["abc"], ["x"]) == [3.0]
    assert metrics.scored(lambda answer, reference: answer == reference, ["a", "b"], ["a", "c"]) == [1.0, 0.0]
    assert metrics.scored(lambda answer, limit=2: len(answer) < limit, ["a"], ["zzz"]) == [1.0]


def test_worst_first_sorts_by_score_then_by_what_was_lost_then_by_loss():
    table = pd.DataFrame({"before_score": [0, 1, 0, 0], "after_score": [1, 0, 0, 0], "after_loss": [9, 1, 2, 3]})
    assert list(ev.worst_first(table).index) == [1, 3, 2, 0]


def test_the_sign_test_is_the_binomial_one():
    before, after = [0] * 60, [1] * 41 + [-1] * 7 + [0] * 12
    test = metrics.paired_test(before, after)
    assert (test.better, test.worse, test.equal) == (41, 7, 12)
    assert test.p == pytest.approx(6.240408438884516e-07, rel=1e-9)  # scipy.stats.binomtest(7, 48).pvalue
    assert str(test) == "better on 41 of 60, worse on 7, p < 0.0001"
    unclear = metrics.paired_test([0] * 10, [1] * 3 + [-1] + [0] * 6)
    assert str(unclear) == "better on 3 of 10, worse on 1, p = 0.62: that may be chance"
    assert metrics.paired_test([1, 2], [1, 2]).p == 1
    with pytest.raises(ValueError, match="score the same examples"):
        metrics.paired_test([1], [1, 2])


def test_chance_alone_is_called_clear_in_about_one_case_of_twenty(say):
    rng = np.random.default_rng(0)
    false_alarms = sum(metrics.paired_test(*rng.normal(size=(2, 60))).clear for _ in range(1000)) / 1000
    say(f"sign test on 60 pairs without a difference: {false_alarms:.1%} called clear (5 % or fewer wanted)")
    assert 0.01 < false_alarms < 0.065


def test_the_interval_covers_the_true_mean_as_often_as_it_says(say):
    rng = np.random.default_rng(1)
    samples = [rng.random(48) < 0.6 for _ in range(300)]
    covered = np.mean(
        [low <= 0.6 <= high for low, high in (metrics.bootstrap_interval(sample, draws=1000) for sample in samples)]
    )
    say(f"95 % bootstrap interval on 48 examples covers the true share in {covered:.1%} of 300 samples")
    assert 0.91 < covered < 0.98


def test_all_right_is_not_certain():
    assert metrics.bootstrap_interval([1.0] * 30) == (0.9, 1.0) and metrics.bootstrap_interval([0.0] * 30) == (0.0, 0.1)
    assert metrics.bootstrap_interval([0.5] * 30) == (0.5, 0.5)
    with pytest.raises(ValueError, match="No values"):
        metrics.bootstrap_interval([])

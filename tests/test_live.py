"""What is seen while it trains, where there is no notebook and where there is one."""

from pathlib import Path

import pytest
from transformers import TrainerState

from helpers import live
from helpers.live import LiveChart
from helpers.runs import Run


@pytest.fixture
def run():
    return Run(Path("runs/x"), "id", {}, history=[{"step": 0, "eval_loss": 4.0}])


def at(step, max_steps=20):
    return TrainerState(global_step=step, max_steps=max_steps)


def begun(run, step=0, max_steps=20, **planned):
    chart = LiveChart(run, **planned)
    chart.on_train_begin(None, at(step, max_steps), None)
    return chart


def test_without_a_notebook_each_loss_is_a_line_of_text(run, capsys):
    chart = begun(run)
    chart.on_log(None, at(0), None, {"eval_loss": 4.0})
    chart.on_log(None, at(0), None, {"train_runtime": 1.0})
    chart.on_train_end(None, at(20), None)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and "validation loss 4.000" in lines[0] and "before the first step" in lines[0]
    assert lines[1].startswith("Diagnosis: too early")


def test_the_plans_time_is_shown_until_ten_real_steps_replace_it(run):
    chart = begun(run, planned_seconds=60)
    assert "about 17.0 min left by the plan, not yet measured" in chart._time_left(at(3))
    chart.started_at -= 100  # 18 steps took 100 seconds
    assert "about 0.2 min left" in chart._time_left(at(18))


def test_in_a_notebook_one_display_is_updated_in_place(run, monkeypatch):
    import IPython.display

    calls = []

    class Handle:
        def update(self, picture):
            calls.append(("update", picture.data[:4]))
            assert "Training and validation loss" in str(picture._repr_mimebundle_())

    def display(picture, display_id=False):
        calls.append(("display", picture.data[:4]))
        return Handle()

    monkeypatch.setattr(live, "has_notebook", lambda: True)
    monkeypatch.setattr(IPython.display, "display", display)
    chart = begun(run)
    for _ in range(3):
        chart.on_log(None, at(1), None, {"eval_loss": 4.0})
    chart.on_train_end(None, at(1), None)  # nothing new to show
    assert calls == [("display", b"\x89PNG"), ("update", b"\x89PNG"), ("update", b"\x89PNG")]


def test_drawing_takes_a_small_share_of_the_time(run, monkeypatch):
    drawn = []
    monkeypatch.setattr(live, "has_notebook", lambda: True)
    chart = begun(run)
    monkeypatch.setattr(chart, "_draw", lambda state: drawn.append(state.global_step))
    chart.started_at -= 100
    chart.drawing_seconds = 3.0  # 3 % of the time so far
    chart.on_log(None, at(1), None, {"loss": 4.0})
    assert drawn == []
    chart.on_log(None, at(2), None, {"eval_loss": 4.0})  # a new validation point is always shown
    chart.drawing_seconds = 1.0
    chart.on_log(None, at(3), None, {"loss": 4.0})
    assert drawn == [2, 3]


def test_a_run_that_outlasts_a_session_is_announced_once(run, capsys):
    begun(run, planned_seconds=3600)
    assert "[WARN] about 20.0 hours left by the plan" in capsys.readouterr().out
    chart = begun(run)
    chart.started_at -= 100 * 3600
    for step in (10, 11):
        chart.on_step_end(None, at(step), None)
    assert capsys.readouterr().out.count("[WARN] about 100.0 hours left") == 1


def test_the_title_has_the_latest_speed_of_this_part_of_the_run(run):
    run.history.append({"step": 5, "loss": 4.0, "tokens_per_second": 9999.0, "padding": 0.5})
    chart = begun(run, 5)
    assert "tokens" not in chart._title(at(5))
    run.history += [
        {"step": 6, "loss": 3.0, "tokens_per_second": 100.4, "padding": 0.081},
        {"step": 6, "eval_loss": 3.0},
    ]
    assert "step 6 of 20  ·  100 tokens/s, 8% padding  ·  " in chart._title(at(6))


def test_a_continued_run_measures_its_own_steps_only(run):
    chart = begun(run, 90, 100)
    chart.started_at -= 60
    assert "about 4.0 min left" in chart._time_left(at(92, 100))

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


def test_without_a_notebook_each_loss_is_a_line_of_text(run, capsys):
    chart = LiveChart(run)
    chart.on_train_begin(None, TrainerState(global_step=0, max_steps=20), None)
    state = TrainerState(global_step=0, max_steps=20)
    chart.on_log(None, state, None, {"eval_loss": 4.0})
    chart.on_log(None, state, None, {"train_runtime": 1.0})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and "validation loss 4.000" in lines[0] and "before the first step" in lines[0]


def test_the_plans_time_is_shown_until_ten_real_steps_replace_it(run):
    chart = LiveChart(run, planned_seconds=60)
    chart.on_train_begin(None, TrainerState(global_step=0, max_steps=20), None)
    assert "about 17.0 min left by the plan, not yet measured" in chart._time_left(
        TrainerState(global_step=3, max_steps=20)
    )
    chart.started_at -= 100  # 18 steps took 100 seconds
    assert "about 0.2 min left" in chart._time_left(TrainerState(global_step=18, max_steps=20))


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
    chart = LiveChart(run)
    chart.on_train_begin(None, TrainerState(global_step=0, max_steps=20), None)
    for _ in range(3):
        chart.on_log(None, TrainerState(global_step=1, max_steps=2), None, {"eval_loss": 4.0})
    assert [kind for kind, _ in calls] == ["display", "update", "update"]
    assert all(data == b"\x89PNG" for _, data in calls)


def test_drawing_takes_a_small_share_of_the_time(run, monkeypatch):
    drawn = []
    monkeypatch.setattr(live, "has_notebook", lambda: True)
    chart = LiveChart(run)
    monkeypatch.setattr(chart, "_draw", lambda state: drawn.append(state.global_step))
    chart.on_train_begin(None, TrainerState(global_step=0, max_steps=20), None)
    chart.started_at -= 100
    chart.drawing_seconds = 3.0  # 3 % of the time so far
    chart.on_log(None, TrainerState(global_step=1, max_steps=20), None, {"loss": 4.0})
    assert drawn == []
    chart.on_log(
        None, TrainerState(global_step=2, max_steps=20), None, {"eval_loss": 4.0}
    )  # a new validation point is always shown
    chart.drawing_seconds = 1.0
    chart.on_log(None, TrainerState(global_step=3, max_steps=20), None, {"loss": 4.0})
    assert drawn == [2, 3]


def test_a_run_that_outlasts_a_session_is_announced_once(run, capsys):
    chart = LiveChart(run, planned_seconds=3600)
    chart.on_train_begin(None, TrainerState(global_step=0, max_steps=20), None)
    assert "[WARN] about 20.0 hours by the plan" in capsys.readouterr().out
    chart = LiveChart(run)
    chart.on_train_begin(None, TrainerState(global_step=0, max_steps=20), None)
    chart.started_at -= 100 * 3600
    for step in (10, 11):
        chart.on_step_end(None, TrainerState(global_step=step, max_steps=20), None)
    assert capsys.readouterr().out.count("[WARN] about 100.0 hours left") == 1


def test_the_title_has_the_speed_and_the_verdict_is_in_the_picture(run, monkeypatch):
    chart = LiveChart(run)
    run.history.append({"step": 0, "num_tokens": 100, "loss": 4.0})
    chart.on_train_begin(None, TrainerState(global_step=0, max_steps=20), None)
    run.history.append({"step": 5, "num_tokens": 1100, "loss": 3.0})
    chart.training_seconds = 10.0
    assert "100 tokens/s" in chart._title(TrainerState(global_step=5, max_steps=20))


def test_a_continued_run_measures_its_own_steps_only(run):
    chart = LiveChart(run)
    chart.on_train_begin(None, TrainerState(global_step=90, max_steps=100), None)
    chart.started_at -= 60
    assert "about 4.0 min left" in chart._time_left(TrainerState(global_step=92, max_steps=100))

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
    chart.on_train_begin(None, None, None)
    state = TrainerState(global_step=0, max_steps=20)
    chart.on_log(None, state, None, {"eval_loss": 4.0})
    chart.on_log(None, state, None, {"train_runtime": 1.0})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and "validation loss 4.000" in lines[0] and "before the first step" in lines[0]


def test_the_plans_time_is_shown_until_ten_real_steps_replace_it(run):
    chart = LiveChart(run, planned_seconds=60)
    chart.on_train_begin(None, None, None)
    assert "about 17.0 min left by the plan, not yet measured" in chart._time_left(TrainerState(global_step=3, max_steps=20))
    chart.started_at -= 100
    assert "about 0.2 min left" in chart._time_left(TrainerState(global_step=18, max_steps=20))


def test_in_a_notebook_one_display_is_updated_in_place(run, monkeypatch):
    import IPython.display

    calls = []

    class Handle:
        def update(self, picture):
            calls.append(("update", picture.data[:4]))

    def display(picture, display_id=False):
        calls.append(("display", picture.data[:4]))
        return Handle()

    monkeypatch.setattr(live, "has_notebook", lambda: True)
    monkeypatch.setattr(IPython.display, "display", display)
    chart = LiveChart(run)
    chart.on_train_begin(None, None, None)
    for _ in range(3):
        chart.on_log(None, TrainerState(global_step=1, max_steps=2), None, {"eval_loss": 4.0})
    assert [kind for kind, _ in calls] == ["display", "update", "update"]
    assert all(data == b"\x89PNG" for _, data in calls)

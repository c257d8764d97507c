"""Runs side by side, and a sweep in one call."""

import io

import pytest

from helpers.config import ConfigError
from helpers.panel.compare import compare_runs, sweep
from helpers.runs import Run, delete_runs


@pytest.mark.slow
def test_a_sweep_trains_each_variation_once_and_compares_them(job, tmp_path, capsys):
    job["config"].max_steps = 3
    overrides = [{"r": 2}, {"r": 8}, {"gradient_checkpointing": "on"}]
    runs = sweep(overrides=overrides, root=tmp_path, **job)
    assert [run.folder.name for run in runs] == ["tiny-r-2", "tiny-r-8", "tiny-gradient_checkpointing-on"]
    assert len({run.settings["data_sha256"] for run in runs}) == len({run.settings["seed"] for run in runs}) == 1
    assert len({run.first_eval_loss for run in runs}) == 1  # B starts at zero: the same untrained model
    table, figure = compare_runs(runs)
    assert list(table["r"]) == [2, 8, 4] and list(table["checkpointing"]) == ["off", "off", "on"]
    assert table["best validation loss"].notna().all() and (table["peak GiB"] > 0).all()
    assert all(run.seconds > 0 for run in runs)
    assert list(table["minutes"]) == [
        round(run.seconds / 60, 2) for run in runs
    ]  # 0.0 where the tiny model trains in no time
    assert "seed" not in table and "model" not in table
    figure.savefig(io.BytesIO(), format="png")
    assert len(figure.axes[0].get_legend().get_texts()) == 3

    capsys.readouterr()
    sweep(overrides=overrides[:1], root=tmp_path, **job)
    assert "already holds this very run" in capsys.readouterr().out
    again, _ = compare_runs([tmp_path / "tiny-r-2", tmp_path / "tiny-r-8"])  # from disk alone
    assert list(again["best validation loss"]) == list(table["best validation loss"][:2])


@pytest.mark.parametrize("field", ["model", "quantization", "seed", "data"])
def test_a_sweep_refuses_what_could_not_be_compared(job, tmp_path, field):
    with pytest.raises(ConfigError, match=field):
        sweep(overrides=[{field: "x"}], root=tmp_path, **job)


def test_a_run_without_a_trained_evaluation_can_be_compared(tmp_path):
    run = Run(tmp_path / "a", "id", {"r": 4}, history=[{"step": 0, "eval_loss": 4.0, "seconds": 1.0}])
    table, _ = compare_runs([run])
    assert table["best validation loss"].isna().all() and table["run"][0] == "a"


def test_deleting_runs_gives_the_disk_back_and_refuses_other_folders(tmp_path, capsys):
    run = Run(tmp_path / "a", "id", {})
    run.save()
    (tmp_path / "a" / "big").write_bytes(b"x" * 2_000_000)
    assert delete_runs(tmp_path / "a") > 2_000_000 and not (tmp_path / "a").exists()
    (tmp_path / "photos").mkdir()
    with pytest.raises(FileNotFoundError, match="is not a run"):
        delete_runs(tmp_path / "photos")
    assert (tmp_path / "photos").is_dir()

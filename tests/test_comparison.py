"""Runs side by side, and deleting them."""

import io

import pytest

from helpers.hardware import GIB
from helpers.panel.compare import compare_runs
from helpers.runs import Run, delete_runs


def a_run(folder, name, losses, **settings):
    events = [{"step": 8 * n, "eval_loss": loss, "seconds": 60.0 * n} for n, loss in enumerate(losses)]
    history = [*events, {"step": 8 * len(losses), "seconds": 300.0, "peak_bytes": 3 * GIB}]
    settings = {"name": name, "seed": 42, "data_sha256": name, "target_modules": ["q_proj"]} | settings
    return Run(folder / name, name, settings, plan={"checkpointing": "off"}, history=history)


def test_what_differs_and_what_came_of_it_stand_side_by_side(tmp_path):
    runs = [a_run(tmp_path, "one", [4.0, 2.0, 1.23456, 1.5], r=4), a_run(tmp_path, "two", [4.0, 3.0], r=8)]
    table, figure = compare_runs(runs)
    assert list(table["run"]) == ["one", "two"] and list(table["r"]) == [4, 8]
    assert list(table["best validation loss"]) == [1.235, 3.0] and list(table["at step"]) == [16, 8]
    assert list(table["peak GiB"]) == [3, 3] and list(table["minutes"]) == [round(run.seconds / 60, 2) for run in runs]
    assert list(table["checkpointing"]) == ["off", "off"]
    assert not {"seed", "name", "data_sha256", "target_modules"} & set(table), "only settings that differ"
    legend = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert legend == ["one, r = 4", "two, r = 8"]
    figure.savefig(io.BytesIO(), format="png")
    for run in runs:
        run.save()
        (run.folder / "history.jsonl").write_text("")
    assert list(compare_runs([Run.load(tmp_path / "one"), Run.load(tmp_path / "two")])[0]["r"]) == [4, 8], (
        "from disk alone"
    )
    untrained, _ = compare_runs([a_run(tmp_path, "a", [4.0], r=4)])
    assert untrained["best validation loss"].isna().all() and untrained["run"][0] == "a"


def test_deleting_runs_gives_the_disk_back_and_refuses_other_folders(tmp_path):
    run = Run(tmp_path / "a", "id", {})
    run.save()
    (tmp_path / "a" / "big").write_bytes(b"x" * 2_000_000)
    assert delete_runs(tmp_path / "a") > 2_000_000 and not (tmp_path / "a").exists()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/run.json").write_text('{"name": "another program"}')
    with pytest.raises(FileNotFoundError, match="is not a run"):
        delete_runs(tmp_path / "photos")
    assert (tmp_path / "photos").is_dir()

"""The panel as a learner sees it: JupyterLab in a real Chromium, from opening the quickstart to comparing two runs.

Screenshots go to `runs/browser/`. Without a browser these tests are skipped and say so; in CI they must run.
"""

from __future__ import annotations

import re
import shutil
import statistics
from pathlib import Path

import pytest

from helpers.panel.panel import SECTIONS
from tests.browser.lab import make_workspace, serve
from tests.browser.notebook import Notebook

pytestmark = pytest.mark.slow

BAR_SECONDS, SLACK = 0.300, 1.5
STEPS = 80  # eight evaluations, each of which redraws the chart: time to see three of them and to interrupt
BROKEN = '{"instruction": "What is a teapot?", "output": ""}\n{"instruction": oops\n'


@pytest.fixture(scope="module")
def pictures(root) -> Path:
    folder = root / "runs" / "browser"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def settings(tiny_model: Path) -> str:
    """A line for the config cell: a tiny model, some seconds of training, no early stop."""
    values = {"model": str(tiny_model), "name": "first", "max_steps": STEPS, "num_evaluations": 8, "r": 4}
    values |= {"max_eval_samples": 16, "max_length": 768, "effective_batch_size": 4, "early_stopping_patience": 0}
    return "\n".join(f"config.{name} = {value!r}" for name, value in values.items())


def test_a_learner_in_jupyterlab(browser, tiny_model, root, tmp_path_factory, pictures, say):
    """One long visit, because starting a server, a browser and a kernel takes longer than everything else."""
    workspace = make_workspace(tmp_path_factory.mktemp("lab") / "kit", root, settings(tiny_model))
    with serve(workspace) as address:
        page = browser.new_page(viewport={"width": 1200, "height": 1400})
        notebook = Notebook(page, f"{address}/doc/tree/quickstart.ipynb", pictures)
        try:
            the_visit(notebook, workspace, say)
        except Exception:
            notebook.picture("failed")
            raise
        finally:
            page.close()


def the_visit(notebook: Notebook, workspace: Path, say) -> None:
    page, panel = notebook.page, notebook.panel
    for start in ("sys.path", "config = ", "control_panel"):
        notebook.run(start)
    panel.wait_for()
    notebook.picture("panel")

    # Another card, a larger model, and sliders moved with the keyboard alone.
    notebook.choose("plan for", "T4")
    notebook.wait_for_plan("of 14.1 GiB")
    notebook.choose("model", "Llama-3.1-8B-Instruct")
    notebook.wait_for_plan("micro-batch 4 x 1")
    seconds = move_sliders(notebook)
    median = statistics.median(seconds)
    times = f"median {1000 * median:.0f} ms, worst {1000 * max(seconds):.0f} ms (bar 300 ms)"
    say(f"panel in Chromium and JupyterLab: key pressed -> bar redrawn, {times}")
    notebook.picture("sliders moved")
    assert median < SLACK * BAR_SECONDS

    # Exact: the dry run replaces "about" by "equals".
    notebook.section("Model")
    notebook.choose("model", "SmolLM2-135M-Instruct")
    notebook.wait_for_plan("≈")
    panel.get_by_role("button", name="Exact").click()
    notebook.wait_for_plan(" = ", seconds=120)
    notebook.picture("exact")
    notebook.choose("plan for", "RTX laptop 4GB")
    notebook.choose("model", "Llama-2-13b-chat-hf")
    notebook.wait_for_plan("This would fit")
    notebook.picture("does not fit")

    # A broken file is reported and not taken.
    notebook.section("Data")
    broken = workspace / "my broken file.jsonl"
    broken.write_text(BROKEN)
    with page.expect_file_chooser() as chooser:
        panel.get_by_role("button", name="Upload a file").click()
    chooser.value.set_files(broken)
    panel.get_by_text("Not taken").wait_for(timeout=20_000)
    report = panel.locator(".ftk-report").inner_text()
    assert "Training cannot start" in report and "'output' is empty" in report and "line" in report
    notebook.picture("broken upload")

    notebook.looks(SECTIONS)

    # Undo everything, then train, interrupt, and go on.
    panel.get_by_role("button", name="Reset").click()
    notebook.wait_for_plan(f"{STEPS} steps")
    for start in ("make_plan(config", "load_quantized", "load_examples"):
        notebook.run(start, seconds=120)
    trained = notebook.start("run = train(")
    notebook.wait_for_redraws(trained, 3)
    notebook.picture("live chart", trained)
    notebook.interrupt()
    notebook.wait_until_done(trained)
    assert re.search(r"Stopped after step \d+", trained.inner_text()), trained.inner_text()
    notebook.run("run = train(", seconds=120)
    assert re.search(rf"Continuing runs/first from step \d+ of {STEPS}", trained.inner_text())
    assert "validation loss" in trained.inner_text()
    notebook.picture("continued", trained)

    # A second run with another rank, set in the panel; then both side by side.
    notebook.section("LoRA")
    notebook.press("rank r", "ArrowRight", 3)
    notebook.section("Training")
    panel.get_by_label("run name").fill("second")
    panel.get_by_label("run name").press("Enter")
    for start in ("make_plan(config", "run = train("):
        notebook.run(start, seconds=120)
    assert "runs/second" in trained.inner_text()
    notebook.section("Compare")
    panel.get_by_role("button", name="Look for new runs").click()
    panel.locator("select[multiple]").select_option(["first", "second"])
    panel.locator(".ftk-scroll table").wait_for(timeout=30_000)
    table = panel.locator(".ftk-scroll table").inner_text()
    assert "first" in table and "second" in table and "32" in table and "best validation loss" in table
    notebook.picture("two runs")
    assert not notebook.errors, notebook.errors
    assert not elsewhere(notebook, workspace), "everything that the panel needs is on the page already"


def elsewhere(notebook: Notebook, workspace: Path) -> list[str]:
    """Addresses that the page asked other computers for, besides those that the notebook's own text names (its badges)."""
    text = (workspace / "quickstart.ipynb").read_text(encoding="utf-8")
    return [address for address in notebook.fetched if address not in text]


def move_sliders(notebook: Notebook) -> list[float]:
    """Seconds from a key press to the redrawn bar, measured inside the page, for every move of two sliders."""
    notebook.section("LoRA")
    seconds = notebook.time_keys("rank r", ["ArrowRight", "ArrowLeft"] * 15)
    notebook.section("Training")
    return seconds + notebook.time_keys("sequence length", ["ArrowRight", "ArrowLeft"] * 15)


def test_the_panel_on_a_notebook_7_page(browser, tiny_model, root, tmp_path_factory, pictures):
    workspace = make_workspace(tmp_path_factory.mktemp("notebook") / "kit", root, settings(tiny_model))
    with serve(workspace, "notebook") as address:
        page = browser.new_page(viewport={"width": 1200, "height": 1200})
        notebook = Notebook(page, f"{address}/notebooks/quickstart.ipynb", pictures)
        try:
            for start in ("sys.path", "config = "):
                notebook.run(start)
            notebook.errors.clear()  # Notebook 7.6.5 itself fails to read a "schema" while it loads any notebook
            notebook.run("control_panel")
            notebook.panel.wait_for()
            before = notebook.bar()
            notebook.choose("model", "Qwen2.5-1.5B-Instruct")
            notebook.wait_for_other_bar(before)
            notebook.section("LoRA")
            # Notebook 7 itself takes the arrow keys, for moving between cells.
            for key in ("PageUp", "PageDown", "End", "Home"):
                before = notebook.bar()
                notebook.press("rank r", key)
                notebook.wait_for_other_bar(before)
        finally:
            notebook.picture("notebook 7")
            page.close()
        assert not notebook.errors, notebook.errors
        assert not elsewhere(notebook, workspace)

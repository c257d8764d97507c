"""Exports that are killed, without room or without rights; and text of users and models that would be code elsewhere."""

import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import time

import nbformat.v4 as nbf
import pytest
from conftest import make_job
from datasets import load_from_disk

from helpers import files
from helpers.export import ExportError, export_script, gguf, merge, model_card, to_gguf, write_report
from helpers.export.script import plan_of
from helpers.files import PART
from helpers.panel.code import as_code
from helpers.runs import Run, delete_runs
from helpers.train import train
from tools.run_notebook import as_page

KILLS = 20 if os.environ.get("ATTACK") else 3
STAGES = pytest.mark.parametrize("stage", ["merge", "gguf", "report", "script"])
ELSEWHERE, CODE = "http://elsewhere.example/x", '"""\nimport os; os.abort()\n"""'
SLOW_CONVERTER = """
import sys, time
with open(sys.argv[sys.argv.index("--outfile") + 1], "wb", buffering=0) as file:
    for number in range(40):
        file.write(bytes([number]) * 100_000)
        time.sleep(0.005)
"""


@pytest.fixture(scope="module")
def trained(tiny_model, tmp_path_factory):
    """A finished run with its data, and a stand-in for llama.cpp's converter."""
    folder = tmp_path_factory.mktemp("trained")
    job = make_job(tiny_model, [{"instruction": f"{n} + {n}?", "output": f"It is {2 * n}."} for n in range(24)])
    train(**job, root=folder)
    for part in ("training", "validation"):
        job[part].save_to_disk(folder / part)
    (folder / "convert_hf_to_gguf.py").write_text(SLOW_CONVERTER)
    return folder


@pytest.fixture
def work(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf, "installed", gguf.installed)  # which `perform` replaces
    return shutil.copytree(trained, tmp_path / "work")


def perform(stage, work):
    """One export of the run into `out`; also the target of a process."""
    gguf.installed, run, out = lambda *tool: work, Run.load(work / "tiny"), work / "out"
    if stage == "merge":
        merge(run, out)
    elif stage == "gguf":
        to_gguf(run.settings["model"], out / "model.gguf")
    elif stage == "report":
        run.folder = out
        out.mkdir(exist_ok=True)
        write_report(run)
    else:
        export_script(run, out, *(load_from_disk(work / part) for part in ("training", "validation")))


def contents(folder):
    """What carries its final name."""
    paths = [path for path in folder.rglob("*") if path.is_file() and PART not in path.relative_to(folder).as_posix()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="kill -9 is POSIX")
@STAGES
def test_killed_at_any_moment_nothing_is_half_and_nothing_is_lost(stage, work, say):
    perform(stage, work)  # once for what only the first time costs
    began = time.monotonic()
    perform(stage, work)
    seconds, expected, chance, inside = time.monotonic() - began, contents(work / "out"), random.Random(1), 0
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["helpers.export"])
    for kill in range(KILLS):
        older = bool(kill % 2)  # is there one to be replaced?
        if not older:
            shutil.rmtree(work / "out")
        child = context.Process(target=perform, args=(stage, work))
        child.start()
        time.sleep(chance.uniform(0.2, 1.2) * seconds)
        inside += child.is_alive()
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        found, aside = contents(work / "out"), contents(work / f"out.older{PART}")
        whole = found == expected or (older and aside == expected) or not (older or found)
        assert whole or (stage == "gguf" and not older and found.items() <= expected.items()), found.keys()
        perform(stage, work)
        assert contents(work / "out") == expected and not list(work.rglob(f"*{PART}"))
    say(f"{stage}: {inside} of {KILLS} kills came before its end")


@STAGES
@pytest.mark.parametrize("code, fix", [(errno.ENOSPC, "delete old runs"), (errno.EROFS, "a folder that you may write")])
def test_a_full_disk_and_a_read_only_one_are_a_sentence_and_leave_nothing(stage, code, fix, work, monkeypatch):
    monkeypatch.setattr(files.os, "fsync", lambda file: (_ for _ in ()).throw(OSError(code, os.strerror(code))))
    with pytest.raises(ExportError, match=rf"out.* could not be written \({os.strerror(code)}\): .*{fix}"):
        perform(stage, work)
    assert not contents(work / "out") and not list(work.rglob(f"*{PART}"))


def test_what_is_not_the_kits_is_neither_deleted_nor_overwritten(work):
    mine = [work / name / "thesis.txt" for name in ("out.part", "out", "photos")]
    for file in mine:
        file.parent.mkdir()
        file.write_text("years of work")
    (work / "photos/run.json").write_text('{"name": "another program"}')
    with pytest.raises(FileNotFoundError, match=r"no run\.json of ours"):
        delete_runs(work / "photos")
    refused = [
        ("merge", "thesis.txt"),
        ("script", "thesis.txt"),
        ("merge", "thesis.txt"),
        ("script", "by someone else"),
    ]
    for stage, said in refused:
        with pytest.raises(ExportError, match=said):
            perform(stage, work)
        if stage == "script":  # a project of one's own may have files of these names
            (work / "out/train.py").write_text("mine")
            (work / "out/merged_from.json").write_text("mine")
    assert [file.read_text() for file in mine] == ["years of work"] * 3
    shutil.rmtree(work / "out")
    perform("script", work)
    perform("script", work)
    (work / "out/adapter").mkdir()  # the script has trained
    with pytest.raises(ExportError, match=r"left alone \(adapter\)"):
        perform("script", work)
    (work / "out/Modelfile").write_text("FROM ./model.gguf\nPARAMETER temperature 0\n")
    perform("gguf", work)
    assert "temperature 0" in (work / "out/Modelfile").read_text()


def test_names_stay_names_in_scripts_and_cards_and_types_are_checked(work):
    run = Run.load(work / "tiny")
    run.settings["model"], run.plan["card"], run.settings["data"] = f"/home/me/{CODE}", CODE, "/home/me/my|`data.csv"
    script = export_script(run, work / "out", *(load_from_disk(work / part) for part in ("training", "validation")))
    assert "abort" not in script.read_text()
    assert json.loads((work / "out/settings.json").read_text())["model"] == run.settings["model"]
    exec(as_code(run.config, plan_of(run), 100), names := {})  # an abort would end this process
    assert names["config"].model == run.settings["model"]
    card = model_card(run)
    assert "/home/me" not in card and "\nimport os" not in card and "| `my\\|'data.csv` |" in card
    for name, value in {"eval_batch": "os", "peak_bytes": "x", "card": ["T4"]}.items():
        run.plan[name], kept = value, run.plan[name]
        for use in (plan_of, write_report, model_card):
            with pytest.raises(ExportError, match=rf"run\.json says {name}=.*put the old one back"):
                use(run)
        run.plan[name] = kept
    del run.plan["dtype"]
    with pytest.raises(ExportError, match="does not say how it was trained"):
        plan_of(run)


def test_pages_ask_nobody_for_anything_and_a_dollar_is_a_dollar(work, browser):
    words, run = f"$5 and $6 ![Badge]({ELSEWHERE}.png) <img src={ELSEWHERE}>", Run.load(work / "tiny")
    evil = {"text/html": f"<script src={ELSEWHERE}.js></script>", "application/javascript": f"fetch('{ELSEWHERE}')"}
    outputs = [nbf.new_output("display_data", {kind: text}) for kind, text in evil.items()]
    cells = [nbf.new_markdown_cell(words), nbf.new_code_cell("1", outputs=outputs)]
    (work / "page.html").write_text(as_page(nbf.new_notebook(cells=cells), "$x$"), encoding="utf-8")
    run.settings["model"] = words
    asked, page = [], browser.new_page()
    page.route(lambda address: address.startswith("http"), lambda route: (asked.append(route), route.abort()))
    for file in (work / "page.html", write_report(run)):
        page.goto(file.as_uri())
        page.wait_for_timeout(500)
        assert asked == [] and "$5 and $6" in page.inner_text("body")
        assert page.locator("mjx-container, .MathJax, script[src^='https']").count() == 0

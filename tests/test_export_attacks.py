"""Exports that are killed, without room or without rights; and text of users and models that would be code elsewhere."""

import json
import multiprocessing
import os
import random
import shutil
import time
from dataclasses import replace

import nbformat.v4 as nbf
import pytest
from conftest import make_job
from datasets import load_from_disk

from helpers import files
from helpers.export import ExportError, export_script, gguf, merge, model_card, to_gguf, write_report
from helpers.export.script import plan_of
from helpers.files import PART
from helpers.panel.code import as_code
from helpers.runs import Run
from helpers.train import train
from tools.run_notebook import as_page

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


def parts(work):
    return [load_from_disk(work / part) for part in ("training", "validation")]


EXPORTS = {
    "merge": lambda run, work: merge(run, work / "out"),
    "gguf": lambda run, work: to_gguf(run.settings["model"], work / "out/model.gguf"),
    "report": lambda run, work: write_report(replace(run, folder=work / "out")),
    "script": lambda run, work: export_script(run, work / "out", *parts(work)),
}


def perform(stage, work, started=None):
    """One export of the run; also the target of a process, which says when it begins."""
    gguf.installed, run = lambda *tool: work, Run.load(work / "tiny")
    (work / "out").mkdir(exist_ok=True)
    if started:
        started.set()
    EXPORTS[stage](run, work)


def contents(folder):
    """What carries its final name."""
    paths = [path for path in folder.rglob("*") if path.is_file() and PART not in path.relative_to(folder).as_posix()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="kill -9 is POSIX")
@pytest.mark.parametrize("stage", EXPORTS)
def test_killed_at_any_moment_nothing_is_half_and_nothing_is_lost(stage, work, attacks, say):
    context, seconds, inside, chance = multiprocessing.get_context("forkserver"), 0.0, 0, random.Random(1)
    context.set_forkserver_preload(["test_export_attacks"])
    perform(stage, work)
    expected = contents(work / "out")
    for kill in range(-1, attacks):  # the first one is only timed
        older = bool(kill % 2)  # is there one to be replaced?
        if not older:
            shutil.rmtree(work / "out")
        child = context.Process(target=perform, args=(stage, work, started := context.Event()))
        child.start()
        started.wait()
        began = time.monotonic()
        child.join(chance.uniform(0, 1.1) * seconds if kill >= 0 else None)
        seconds, inside = seconds or time.monotonic() - began, inside + child.is_alive()
        child.kill()
        child.join()
        found, aside = contents(work / "out"), contents(work / f"out.older{PART}")
        whole = found == expected or (older and aside == expected) or not (older or found)
        assert whole or (stage == "gguf" and not older and found.items() <= expected.items()), found.keys()
        perform(stage, work)
        assert contents(work / "out") == expected and not list(work.rglob(f"*{PART}"))
    say(f"{stage}: {inside} of {attacks} kills came before its end")


@pytest.mark.parametrize("stage", EXPORTS)
@pytest.mark.parametrize("code, fix", [(28, "delete old runs"), (30, "a folder that you may write")])
def test_a_full_disk_and_a_read_only_one_are_a_sentence_and_leave_nothing(stage, code, fix, work, monkeypatch):
    monkeypatch.setattr(files.os, "fsync", lambda file: (_ for _ in ()).throw(OSError(code, os.strerror(code))))
    with pytest.raises(ExportError, match=rf"out.* could not be written \({os.strerror(code)}\): .*{fix}"):
        perform(stage, work)
    assert not contents(work / "out") and not list(work.rglob(f"*{PART}"))


def test_what_is_not_the_kits_is_neither_deleted_nor_overwritten(work):
    mine = [work / name / "thesis.txt" for name in ("out.part", "out")]
    for file in mine:
        file.parent.mkdir()
        file.write_text("years of work")
    for said in ("holds thesis.txt", "holds thesis.txt|was written or changed"):
        for stage in ("merge", "script"):
            with pytest.raises(ExportError, match=said):
                perform(stage, work)
        for sign in ("train.py", "merged_from.json"):  # a project of one's own may have files of these names
            (work / "out" / sign).write_text("mine")
    assert [file.read_text() for file in mine] == ["years of work"] * 2
    shutil.rmtree(work / "out")
    for _ in range(2):  # the second time, the first one is replaced
        perform("script", work)
    (work / "out/adapter").mkdir()  # the script has trained
    with pytest.raises(ExportError, match="holds adapter, so it is left alone: name another folder"):
        perform("script", work)
    (work / "out/Modelfile").write_text("FROM ./model.gguf\nPARAMETER temperature 0\n")
    perform("gguf", work)
    assert "temperature 0" in (work / "out/Modelfile").read_text()


def test_names_stay_names_in_scripts_and_cards_and_types_are_checked(work):
    run = Run.load(work / "tiny")
    run.settings["model"], run.plan["card"], run.settings["data"] = f"/home/me/{CODE}", CODE, "/home/me/my|`data.csv"
    script = export_script(run, work / "out", *parts(work))
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

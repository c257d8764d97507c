"""A Hub token is used and never kept: a notebook trains a gated model with a planted token and exports everything that can be exported.

Afterwards the token is looked for in the executed notebook, in everything that the kernel said, in the run folder with its exports
(zip files opened), in what was uploaded, and in the download cache.
"""

import base64
import io
import json
import os
import zipfile

import nbformat
import pytest

from tests.fake_hub import FakeHub

pytestmark = pytest.mark.slow
TOKEN = "hf_PlantedTokenThatMustNotBeSeen"
CELLS = [
    "import os, logging\nlogging.basicConfig(level=logging.DEBUG)\nfrom helpers.setup import check_setup\ncheck_setup()",
    "from helpers.config import TrainConfig\nfrom helpers.hardware import detect_gpu\nfrom helpers.menu import choose_model\n"
    "from helpers.planner import make_plan\n"
    "config = TrainConfig(name='planted', model='someone/gated', data='letters.jsonl', r=4, max_steps=2, effective_batch_size=2, max_length=128,"
    " num_evaluations=1)\n"
    "gpu = detect_gpu()\nmodel_id, reason = choose_model(config, gpu)\nplan = make_plan(config, gpu, model_id)\nprint(plan, config)",
    "from helpers.models import load_quantized\nmodel, tokenizer = load_quantized(config, plan)",
    "from helpers.data import load_examples, split\n"
    "training, validation = split(load_examples(config.data), config.validation_share, config.seed)",
    "from helpers.train import train\nrun = train(config, plan, model, tokenizer, training, validation)",
    "from helpers.evaluation import compare_before_after\nfrom helpers.export import export_script, merge, push_to_hub, zip_folder\n"
    "compare_before_after(run.model, tokenizer, validation.select(range(1)), max_new_tokens=4)",
    "export_script(run, training=training, validation=validation)\nzip_folder(merge(run))\nzip_folder(run.adapter)\n"
    "push_to_hub(run.adapter, 'me/planted')",
    "from helpers.hub import from_hub\n"
    "try:\n    from_hub('someone/missing')\nexcept Exception as error:\n    print(repr(error), vars(error))",
]


@pytest.fixture(scope="module")
def planted(tiny_model, root, tmp_path_factory):
    """(executed notebook as text, the working folder, the Hub)."""
    from nbclient import NotebookClient

    folder = tmp_path_factory.mktemp("planted")
    rows = [{"instruction": f"What is {n} plus {n}?", "output": f"The sum is {2 * n}."} for n in range(20)]
    (folder / "letters.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])
    with FakeHub(token=TOKEN) as hub, pytest.MonkeyPatch.context() as patch:
        hub.add("someone/gated", tiny_model, gated=True)
        loud = {
            "TRANSFORMERS_VERBOSITY": "debug",
            "HF_HUB_VERBOSITY": "debug",
            "DATASETS_VERBOSITY": "debug",
            "PYTHONPATH": str(root),
        }
        for name, value in (hub.environment(folder / "cache", TOKEN) | loud).items():
            patch.setenv(name, value)
        NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    return nbformat.writes(notebook), folder, hub


def shapes(token):
    """The token as it is, and as it would look in the usual encodings."""
    return [
        token.encode(),
        base64.b64encode(token.encode()).rstrip(b"="),
        token.encode("utf-16-le"),
        token[3:].encode(),
    ]


def pieces(name, content):
    """(name, bytes) of a file, and of what is inside if it is an archive."""
    yield name, content
    if zipfile.is_zipfile(io.BytesIO(content)):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            for inner in archive.namelist():
                yield f"{name}/{inner}", archive.read(inner)


def test_the_token_was_really_used(planted):
    _, _, hub = planted
    fetched = {
        path.rpartition("/")[2]
        for method, path, token in hub.requests
        if method == "GET" and "/resolve/" in path and token == TOKEN
    }
    assert {"config.json", "model.safetensors"} <= fetched
    assert "adapter_model.safetensors" in hub.repositories["me/planted"].files


def test_it_is_nowhere_in_the_notebook_or_in_what_was_said(planted):
    executed, _, _ = planted
    assert "a Hub token is there" in executed and "DEBUG" in executed
    assert not [shape for shape in shapes(TOKEN) if shape in executed.encode()]


def test_it_is_in_no_file_that_the_run_the_exports_or_the_downloads_left(planted, say):
    _, folder, hub = planted
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    uploaded = {f"uploaded/{name}": content for name, content in hub.repositories["me/planted"].files.items()}
    looked_at, found = 0, []
    for name, content in (files | uploaded).items():
        for piece, inner in pieces(name, content):
            looked_at += 1
            found += [piece for shape in shapes(TOKEN) if shape in inner]
    say(f"{looked_at} files looked at, the token in {len(found)}")
    assert found == []
    kinds = {os.path.splitext(name)[1] for name in files}
    assert {".json", ".jsonl", ".safetensors", ".md", ".py", ".zip"} <= kinds


def test_the_search_would_find_it():
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("config.json", json.dumps({"token": TOKEN}))
    assert any(shape in inner for _, inner in pieces("x.zip", archive.getvalue()) for shape in shapes(TOKEN))

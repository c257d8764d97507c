"""Downloads from the Hub, against a Hub on this machine behind HF_ENDPOINT: what is fetched, what is refused, and what is said."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fake_hub import FakeHub

CONFIG = json.dumps({"model_type": "llama"}).encode()
SMALL = {"config.json": CONFIG, "model.safetensors": b"weights", "tokenizer.json": b"{}", "README.md": b"card"}
LLAMA = "meta-llama/Llama-3.2-1B-Instruct"
FETCH = """
from pathlib import Path
import shutil, types
from helpers.hub import WeightsError
from helpers.weights import fetch_weights
{before}
try:
    folder = fetch_weights({model!r})
    print("FOLDER", folder)
    print("FILES", *sorted(file.name for file in Path(folder).iterdir() if file.is_file()))
except WeightsError as error:
    print(type(error).__name__, error)
"""


@pytest.fixture
def hub():
    with FakeHub() as hub:
        yield hub


@pytest.fixture
def fetch(hub, root, tmp_path):
    """`fetch_weights` in a Python of its own (huggingface_hub reads HF_ENDPOINT once, when it is imported): what it printed."""

    def run(model, before="", token="", place=None):
        environment = (
            os.environ
            | hub.environment(tmp_path / "cache", token)
            | ({"KAGGLE_KERNEL_RUN_TYPE": "x"} if place == "kaggle" else {})
        )
        code = FETCH.format(model=model, before=before)
        done = subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def free_disk(gigabytes):
    return f"shutil.disk_usage = lambda place: types.SimpleNamespace(free={gigabytes}e9)"


def test_a_model_is_fetched_once_and_found_again_without_the_hub(hub, fetch):
    hub.add("someone/model", SMALL)
    out = fetch("someone/model")
    assert (
        "FILES config.json model.safetensors tokenizer.json" in out
        and Path(out.split()[1], "model.safetensors").read_bytes() == b"weights"
    )
    assert sorted(hub.downloaded()) == ["config.json", "model.safetensors", "tokenizer.json"]
    fetch("someone/model")
    assert len(hub.downloaded()) == 3
    hub.down = True
    assert "FILES config.json model.safetensors" in fetch("someone/model")


@pytest.mark.parametrize(
    "needed, twice",
    [
        (["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"], ["consolidated.safetensors"]),
        (["model.safetensors"], ["adapter_model.safetensors"]),
    ],
)
def test_what_is_there_twice_or_in_other_formats_is_not_fetched(hub, fetch, needed, twice):
    small = ["config.json", "tokenizer.model", *(["model.safetensors.index.json"] if len(needed) > 1 else [])]
    other = ["pytorch_model.bin", "original/consolidated.00.pth", "onnx/model.safetensors", "README.md"]
    hub.add("someone/model", {name: name.encode() for name in [*small, *needed, *twice, *other]})
    fetch("someone/model")
    assert sorted(hub.downloaded()) == sorted([*small, *needed])


def test_a_download_that_does_not_fit_the_disk_is_refused_before_it_starts(hub, fetch):
    hub.add("someone/large", SMALL, sizes={"model.safetensors": 15_200_000_000})
    out = fetch("someone/large", before=free_disk(16))
    assert "HubRefusal someone/large is a download of 15.2 GB, and 16.0 GB are free" in out and "HF_HOME" in out
    assert hub.downloaded() == []
    hub.add("someone/small", SMALL)
    assert "FILES" in fetch("someone/small", before=free_disk(1.01))
    hub.add("someone/small", SMALL, sizes={"model.safetensors": 15_200_000_000})
    assert "FILES" in fetch("someone/small", before=free_disk(1.01))  # nothing of it is downloaded again


GATED = f"HubRefusal {LLAMA} is gated: accept its license first, signed in, at https://huggingface.co/{LLAMA}"


@pytest.mark.parametrize(
    "model, options, said",
    [
        ("someone/old", {}, ["Pickled weights (.bin) are refused"]),
        ("someone/stray", {}, ["Pickled weights (.bin) are refused"]),
        (LLAMA, {}, [GATED, "environment variable HF_TOKEN", 'config.model = "TinyLlama-1.1B-Chat-v1.0"']),
        (LLAMA, {"place": "kaggle"}, [GATED, "Add-ons > Secrets"]),
        (LLAMA, {"token": FakeHub.token_without_right}, ["A token is there, but not with that right"]),
        ("someone/gated", {}, ['config.model = "Mistral-7B-Instruct-v0.3"']),  # the nearest in size
        ("someone/model", {"token": "hf_expired"}, ["refuses the token that it was given"]),
        (
            "someone/missing",
            {"token": FakeHub.token},
            ["No weights for 'someone/missing'", "404", "Check the spelling"],
        ),
        ("someone/down", {}, ["Hugging Face Hub: it does not answer, and someone/down is not in its cache"]),
    ],
)
def test_what_cannot_be_had_is_refused_before_anything_is_fetched_with_what_to_do(hub, fetch, model, options, said):
    pickles = {"config.json": CONFIG, "pytorch_model.bin": b"pickle"}
    hub.add("someone/old", pickles)
    hub.add("someone/stray", pickles | {"stray.safetensors": b"x"})
    hub.add("someone/model", SMALL)
    hub.add("someone/gated", SMALL, gated=True, parameters=7_000_000_000)
    hub.add(LLAMA, SMALL, gated=True)
    hub.down = model == "someone/down"
    out = fetch(model, **options)
    assert all(words in out for words in said), out
    assert hub.downloaded() == [] and "hf_" not in out  # nor is the token shown


def test_a_gated_model_that_the_token_may_read_is_fetched(hub, fetch):
    hub.add(LLAMA, SMALL, gated=True)
    out = fetch(LLAMA, token=hub.token)
    assert "FILES config.json model.safetensors" in out and hub.token not in out


def test_the_tokenizer_of_a_gated_model_says_the_same(hub, root, tmp_path):
    hub.add(LLAMA, SMALL, gated=True)
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"} | hub.environment(
        tmp_path
    )
    code = f"from helpers.data.tokens import load_tokenizer; load_tokenizer({LLAMA!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True)
    assert f"DataError: {LLAMA} is gated: accept its license first" in done.stderr


def test_half_a_download_is_not_taken_for_a_model(hub, fetch, tmp_path):
    index = json.dumps(
        {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    ).encode()
    files = {
        "config.json": CONFIG,
        "model.safetensors.index.json": index,
        "model-00001-of-00002.safetensors": b"1",
        "model-00002-of-00002.safetensors": b"2",
    }
    hub.add("someone/sharded", files)
    folder = Path(fetch("someone/sharded").split()[1])
    (folder / "model-00002-of-00002.safetensors").unlink()
    hub.down = True
    out = fetch("someone/sharded")
    assert "FOLDER" not in out and "is not in its cache, or not all of it" in out
    hub.down = False
    assert "FILES" in fetch("someone/sharded")


TRAIN = """
import os, sys
sys.path.insert(0, "tests")
{before}
from conftest import make_job
from pathlib import Path
from helpers.export import merge
from helpers.train import train
rows = [{{"instruction": f"What is {{n}}?", "output": f"It is {{n}}."}} for n in range(12)]
merge(train(**make_job(Path({model!r}), rows, max_steps=1, num_evaluations=1), root={runs!r}))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "before, asked",
    [("", False), ("import trl", False), ("os.environ['HF_HUB_DISABLE_TELEMETRY'] = '0'", True)],
    ids=["helpers first", "trl first", "allowed"],
)
def test_training_a_local_model_asks_nobody_anything_unless_allowed(hub, root, tmp_path, tiny_model, before, asked):
    code = TRAIN.format(before=before, model=str(tiny_model), runs=str(tmp_path / "runs"))
    environment = os.environ | hub.environment(tmp_path / "cache")
    for name in ("HF_HUB_DISABLE_TELEMETRY", "CI"):  # TRL is silent where CI is set
        environment.pop(name, None)
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert bool(hub.requests) is asked, hub.requests

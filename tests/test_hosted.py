"""Colab and Kaggle without Colab and Kaggle: the first cell, secrets, Drive, the card that is chosen, what goes up and what comes down.

The stand-in for Colab's package is `tests/colab/fake_colab`; `make test-colab` runs the quickstart with it.
"""

import importlib
import json
import os
import shutil
import subprocess
import sys
import types
import zipfile

import pytest

from helpers import setup as runtime
from helpers.export import download, zip_folder
from helpers.runs import Run
from helpers.train import train
from tests.colab.colab_machine import FAKES
from tests.fake_hub import FakeHub


@pytest.fixture
def colab(monkeypatch, tmp_path):
    """Colab's package, imported as its kernel imports it, with Drive to be mounted under tmp_path."""
    import huggingface_hub.utils._auth as auth

    monkeypatch.syspath_prepend(str(FAKES))
    colab = importlib.import_module("google.colab")
    monkeypatch.setattr(auth, "is_google_colab", lambda: True)
    monkeypatch.setattr(auth, "is_colab_enterprise", lambda: False)
    monkeypatch.setattr(auth, "_IS_GOOGLE_COLAB_CHECKED", False)
    monkeypatch.setattr(auth, "_GOOGLE_COLAB_SECRET", None)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "no token file"))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no token file" / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(runtime, "DRIVE", tmp_path / "drive" / "MyDrive")
    yield colab
    for name in [name for name in sys.modules if name.startswith("google.colab")]:
        del sys.modules[name]


@pytest.fixture
def kaggle(monkeypatch):
    """Kaggle's secret store: a dict to be filled."""
    secrets = {}

    def get_secret(label):
        if label not in secrets:
            raise ValueError(f"No user secrets exist for kernel id 1 and label {label}")
        return secrets[label]

    module = types.ModuleType("kaggle_secrets")
    module.UserSecretsClient = lambda: types.SimpleNamespace(get_secret=get_secret)
    monkeypatch.setitem(sys.modules, "kaggle_secrets", module)
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    monkeypatch.setenv("HF_TOKEN", "")  # put back afterwards, whatever find_token writes
    return secrets


# ------------------------------------------------------------------------------------------------------------- secrets


def test_colabs_secret_is_found_by_the_hubs_own_library(colab, capsys):
    from huggingface_hub import get_token

    colab.userdata.SECRETS["HF_TOKEN"] = "hf_fromthekeyicon"
    try:
        assert runtime.where() == "colab" and runtime.find_token() and get_token() == "hf_fromthekeyicon"
        assert "HF_TOKEN" not in os.environ and "hf_" not in capsys.readouterr().out
    finally:
        colab.userdata.SECRETS.clear()


@pytest.mark.parametrize("error", ["SecretNotFoundError", "NotebookAccessError", "TimeoutException"])
def test_a_secret_that_colab_does_not_give_means_no_token(colab, monkeypatch, error):
    monkeypatch.setattr(colab.userdata, "ANSWER", getattr(colab.userdata, error)("HF_TOKEN"))
    assert runtime.find_token() is False


def test_kaggles_secret_is_found_after_the_environments_and_its_absence_is_no_error(kaggle, monkeypatch):
    assert runtime.where() == "kaggle" and runtime.find_token() is False
    kaggle["HF_TOKEN"] = "hf_fromkaggle"
    assert runtime.find_token() and os.environ["HF_TOKEN"] == "hf_fromkaggle"
    monkeypatch.setenv("HF_TOKEN", "hf_fromtheenvironment")
    assert runtime.find_token() and os.environ["HF_TOKEN"] == "hf_fromtheenvironment"


def test_no_notebook_and_no_helper_asks_for_a_login(root):
    for path in [*(root / "notebooks").rglob("*.ipynb"), *(root / "helpers").rglob("*.py")]:
        text = path.read_text(encoding="utf-8")
        assert "notebook_login" not in text and "login(" not in text, path


# --------------------------------------------------------------------------------------------------------------- Drive


def test_a_mounted_drive_holds_the_run_and_brings_it_back_after_the_session(colab, job, tmp_path, capsys):
    assert runtime.mount_drive() and runtime.mount_drive()  # the second time there is nothing to do
    run = train(**job, root=tmp_path / "session 1")
    copied = runtime.DRIVE / "finetune-kit" / "runs" / "tiny"
    assert Run.load(copied).finished and (copied / "adapter" / "adapter_model.safetensors").is_file()
    shutil.rmtree(tmp_path / "session 1")
    again = train(**job, root=tmp_path / "session 2")
    assert again.history == run.history and "already holds this very run" in capsys.readouterr().out


@pytest.mark.parametrize("words", ["mount failed", "credential propagation was unsuccessful"])
def test_a_drive_that_cannot_be_mounted_is_a_warning(colab, monkeypatch, capsys, words):
    monkeypatch.setattr(colab.drive, "FAILS", words)
    assert runtime.mount_drive() is False
    out = capsys.readouterr().out
    assert out.startswith("[WARN] Google Drive could not be mounted")
    assert words in out and "Training works without it" in out


def test_elsewhere_drive_is_not_asked_for(capsys):
    assert runtime.mount_drive() is False
    assert "in Colab only" in capsys.readouterr().out


def test_a_drive_that_died_is_no_place_and_one_that_cannot_be_read_is_a_warning(
    colab, job, tmp_path, monkeypatch, capsys
):
    from helpers import runs

    class Dead(type(tmp_path)):
        def is_dir(self):
            raise OSError(107, "Transport endpoint is not connected")

    monkeypatch.setattr(runtime, "DRIVE", Dead("/content/drive/MyDrive"))
    assert runtime.backup_dir() is None
    (tmp_path / "drive" / "tiny").mkdir(parents=True)
    (tmp_path / "drive" / "tiny" / "run.json").touch()
    monkeypatch.setattr(runs, "_read_record", lambda file: Dead("/content").is_dir())
    assert train(**job, root=tmp_path / "runs", copy_to=tmp_path / "drive").finished
    assert "cannot be read ([Errno 107] Transport endpoint is not connected)" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------- down and up


@pytest.fixture
def adapter(tmp_path):
    folder = tmp_path / "run" / "adapter"
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    return folder


def test_colab_hands_the_zip_to_the_browser(colab, adapter):
    file = zip_folder(adapter)
    download(file)
    assert colab.files.DOWNLOADED.pop() == str(file.resolve())
    with zipfile.ZipFile(file) as archive:
        assert len(archive.namelist()) == 2


UPLOAD = """
import sys, types
secrets = types.ModuleType("kaggle_secrets")
secrets.UserSecretsClient = lambda: types.SimpleNamespace(get_secret=lambda label: {token!r})
sys.modules["kaggle_secrets"] = secrets
from helpers.export import ExportError, push_to_hub
try:
    push_to_hub({folder!r}, "me/letters")
except ExportError as error:
    print("ExportError", error)
"""


@pytest.mark.parametrize("right", [True, False])
@pytest.mark.slow
def test_on_kaggle_an_upload_uses_the_secret_is_private_and_shows_no_token(root, adapter, tmp_path, right):
    with FakeHub() as hub:
        token = hub.token if right else hub.token_without_right
        environment = os.environ | hub.environment(tmp_path / "cache") | {"KAGGLE_KERNEL_RUN_TYPE": "Batch"}
        code = UPLOAD.format(token=token, folder=str(adapter))
        done = subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert token not in done.stdout + done.stderr
        if right:
            assert hub.repositories["me/letters"].private
            assert hub.repositories["me/letters"].files["adapter_model.safetensors"] == b"weights"
        else:
            assert "ExportError Nothing whole has arrived at me/letters yet" in done.stdout and hub.repositories == {}


def test_every_setup_cell_imports_helpers_before_torch(root):
    """So that PyTorch's allocator reads what the package asks for: nothing imports torch before the first cell has imported helpers."""
    for path in (root / "notebooks").rglob("[0-9][0-9]_*.ipynb"):
        cells = [
            "".join(cell["source"])
            for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]
            if cell["cell_type"] == "code"
        ]
        assert "helpers" in cells[0] and "torch" not in cells[0], path

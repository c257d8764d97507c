"""Uploads happen only when asked for, private unless said otherwise; the zip holds what the folder holds."""

import inspect
import zipfile
from types import SimpleNamespace

import httpx
import pytest
from huggingface_hub import HfApi
from huggingface_hub.utils import filter_repo_objects

from helpers import files
from helpers.export import ExportError, download, hub, merge, push_to_hub, zip_folder
from helpers.train import train


class FakeApi:
    """Takes the calls of `HfApi` and writes them down."""

    def __init__(self, error=None):
        self.calls, self.error = [], error

    def create_repo(self, repo_id, **settings):
        self.calls.append(("create_repo", repo_id, settings))
        return f"https://huggingface.co/{repo_id}"

    def upload_folder(self, **settings):
        self.calls.append(("upload_folder", settings))
        if self.error:
            raise self.error


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "run/adapter"
    folder.mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    (folder / "README.md").write_text("card")
    return folder


def test_an_upload_is_private_unless_said_otherwise(folder):
    api = FakeApi()
    assert push_to_hub(folder, "me/it", api=api) == "https://huggingface.co/me/it"
    (_, repo, created), (_, uploaded) = api.calls
    assert repo == "me/it" and created == {"private": True, "exist_ok": True}
    assert (uploaded["repo_id"], uploaded["folder_path"]) == ("me/it", folder)
    assert set(uploaded) <= set(inspect.signature(HfApi.upload_folder).parameters)
    assert set(created) <= set(inspect.signature(HfApi.create_repo).parameters)
    push_to_hub(folder, "me/it", private=False, api=api)
    assert api.calls[2][2]["private"] is False


def test_what_is_half_written_or_pickled_is_never_uploaded(folder):
    api = FakeApi()
    push_to_hub(folder, "me/it", api=api)
    names = ["adapter.safetensors", "a.part", "x/a.part", "x.part/a", "checkpoints/1/a", "x/checkpoints/1/a"]
    names += ["training_args.bin", "x/training_args.bin"]
    kept = filter_repo_objects(names, ignore_patterns=api.calls[1][1]["ignore_patterns"])
    assert list(kept) == ["adapter.safetensors"]


def test_training_and_exporting_upload_nothing(job, tmp_path, monkeypatch):
    for name in ("create_repo", "upload_folder", "upload_file", "create_commit"):
        monkeypatch.setattr(HfApi, name, lambda *args, **kwargs: pytest.fail("an upload that nobody asked for"))
    zip_folder(merge(train(**job, root=tmp_path)))


def test_what_goes_wrong_is_one_sentence(folder, tmp_path, monkeypatch):
    with pytest.raises(ExportError, match="nothing to upload"):
        push_to_hub(tmp_path / "nowhere", "me/it", api=FakeApi())
    with pytest.raises(ExportError, match=r"Nothing whole has arrived at me/it yet \(no route\): .* call it again"):
        push_to_hub(folder, "me/it", api=FakeApi(httpx.ConnectError("no route")))
    half = folder.rename(folder.with_name(f"merged{files.PART}"))
    with pytest.raises(ExportError, match="half written"):
        push_to_hub(half, "me/it", api=FakeApi())
    monkeypatch.setattr(hub, "find_token", lambda: False)
    with pytest.raises(ExportError, match=r"no Hub token: make one at https://huggingface\.co/settings/tokens"):
        push_to_hub(half.rename(folder), "me/it")


def test_the_zip_holds_the_folder_and_nothing_half_written(folder):
    (folder / f"model.safetensors{files.PART}").write_bytes(b"half")
    file = zip_folder(folder)
    assert file.name == "run-adapter.zip" and not list(folder.parent.glob("*.part"))
    with zipfile.ZipFile(file) as archive:
        assert sorted(archive.namelist()) == ["adapter/README.md", "adapter/adapter_model.safetensors"]
        assert archive.testzip() is None


def test_an_empty_folder_and_a_full_disk_are_refused(folder, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ExportError, match="nothing to pack"):
        zip_folder(tmp_path / "empty")
    monkeypatch.setattr(files.shutil, "disk_usage", lambda place: SimpleNamespace(free=0))
    with pytest.raises(ExportError, match="delete old runs"):
        zip_folder(folder)
    assert not list(folder.parent.glob("*.zip*"))


def test_outside_colab_a_download_names_the_file(folder, capsys):
    file = zip_folder(folder)
    download(file)
    assert str(file) in capsys.readouterr().out

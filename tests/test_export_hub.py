"""Uploads happen only when asked for, private unless said otherwise; the zip holds what the folder holds."""

import zipfile
from unittest.mock import create_autospec

import httpx
import pytest
from huggingface_hub import HfApi
from huggingface_hub.utils import filter_repo_objects

from helpers import files
from helpers.export import ExportError, download, hub, merge, push_to_hub, zip_folder
from helpers.train import train


@pytest.fixture
def api():
    """`HfApi`'s own methods and signatures, which only write down that they were called."""
    api = create_autospec(HfApi, instance=True)
    api.create_repo.return_value = "https://huggingface.co/me/it"
    return api


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "run/adapter"
    folder.mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    (folder / "README.md").write_text("card")
    return folder


def test_an_upload_is_private_unless_said_otherwise(folder, api):
    assert push_to_hub(folder, "me/it", api=api) == "https://huggingface.co/me/it"
    api.create_repo.assert_called_once_with("me/it", private=True, exist_ok=True)
    assert api.upload_folder.call_args.kwargs["folder_path"] == folder
    push_to_hub(folder, "me/it", private=False, api=api)
    assert api.create_repo.call_args.kwargs["private"] is False


def test_what_is_half_written_or_pickled_is_never_uploaded(folder, api):
    push_to_hub(folder, "me/it", api=api)
    names = ["adapter.safetensors", "a.part", "x/a.part", "x.part/a", "checkpoints/1/a", "x/checkpoints/1/a"]
    names += ["training_args.bin", "x/training_args.bin"]
    kept = filter_repo_objects(names, ignore_patterns=api.upload_folder.call_args.kwargs["ignore_patterns"])
    assert list(kept) == ["adapter.safetensors"]


def test_training_and_exporting_upload_nothing(job, tmp_path, monkeypatch):
    for name in ("create_repo", "upload_folder", "upload_file", "create_commit"):
        monkeypatch.setattr(HfApi, name, lambda *args, **kwargs: pytest.fail("an upload that nobody asked for"))
    zip_folder(merge(train(**job, root=tmp_path)))


def test_what_goes_wrong_is_one_sentence(folder, api, tmp_path, monkeypatch):
    api.upload_folder.side_effect = httpx.ConnectError("no route")
    with pytest.raises(ExportError, match="nothing to upload"):
        push_to_hub(tmp_path / "nowhere", "me/it", api=api)
    with pytest.raises(ExportError, match="nothing to pack"):
        zip_folder(tmp_path / "nowhere")
    with pytest.raises(ExportError, match=r"Nothing whole has arrived at me/it yet \(no route\): .* call it again"):
        push_to_hub(folder, "me/it", api=api)
    half = folder.rename(folder.with_name(f"merged{files.PART}"))
    with pytest.raises(ExportError, match="half written"):
        push_to_hub(half, "me/it", api=api)
    monkeypatch.setattr(hub, "find_token", lambda: False)
    with pytest.raises(ExportError, match=r"no Hub token: make one at https://huggingface\.co/settings/tokens"):
        push_to_hub(half.rename(folder), "me/it")


def test_the_zip_holds_the_folder_and_nothing_half_written_and_is_named_outside_colab(folder, capsys):
    (folder / f"model.safetensors{files.PART}").write_bytes(b"half")
    file = zip_folder(folder)
    assert file.name == "run-adapter.zip" and not list(folder.parent.glob("*.part"))
    with zipfile.ZipFile(file) as archive:
        assert sorted(archive.namelist()) == ["adapter/README.md", "adapter/adapter_model.safetensors"]
        assert archive.testzip() is None
    download(file)
    assert str(file) in capsys.readouterr().out

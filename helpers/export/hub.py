"""Away from this machine: the Hub (only when you call it, private unless you say otherwise), or a zip file to download."""

from __future__ import annotations

from pathlib import Path
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

from helpers.disk import writing
from helpers.export.card import add_card
from helpers.files import PART, ExportError, atomic_file
from helpers.setup import find_token, is_network_error, where

NEVER_UPLOADED = ["*checkpoints/*", "*.part", "*.part/*", "*training_args.bin"]  # here, a star stands for slashes too
STORED = (".safetensors", ".gguf", ".png", ".zip")  # compressing these again gains nothing


def push_to_hub(folder: str | Path, repo: str, private: bool = True, api: HfApi | None = None) -> str:
    """Upload an adapter, a merged model or a GGUF folder to the Hub, with its model card, and return its address.

    Broken off, call it again: what has arrived is not sent twice.

    Args:
        repo: "your-name/your-model". If it exists, it keeps the visibility that it has.
        private: False shows it to the world; think of the data and of the base model's license first.

    Raises:
        ExportError: nothing to upload, no token, or the Hub refuses.
    """
    folder = Path(folder)
    if not folder.is_dir() or not any(folder.iterdir()):
        raise ExportError(f"{folder} holds nothing to upload: give the adapter's or the merged model's folder.")
    if folder.name.endswith(PART):
        raise ExportError(f"{folder} is half written: export it again first.")
    if api is None and not find_token():
        where_to_get = "make one at https://huggingface.co/settings/tokens (type: write)"
        raise ExportError(f"There is no Hub token: {where_to_get} and keep it as the secret or variable HF_TOKEN.")
    add_card(folder, folder.resolve().parent)
    api = api or HfApi()
    try:
        address = api.create_repo(repo, private=private, exist_ok=True)
        message = "Upload from finetune-kit"
        api.upload_folder(repo_id=repo, folder_path=folder, ignore_patterns=NEVER_UPLOADED, commit_message=message)
    except Exception as error:
        if not isinstance(error, (HfHubHTTPError, LocalTokenNotFoundError, OSError)) and not is_network_error(error):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise ExportError(f"Nothing whole has arrived at {repo} yet ({reason}): mend that, call it again.") from error
    print(f"Uploaded {folder} to {address} ({'private' if private else 'visible to everyone'} if it is new).")
    return str(address)


def zip_folder(folder: str | Path, file: str | Path | None = None) -> Path:
    """`folder` with its model card as one zip file beside it (`ExportError`: nothing is in it, or the disk is full)."""
    folder = Path(folder)
    add_card(folder, folder.resolve().parent)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and PART not in str(path.relative_to(folder)))
    if not files:
        raise ExportError(f"{folder} holds nothing to pack: train or export first.")
    target = Path(file) if file else folder.with_name(f"{folder.resolve().parent.name}-{folder.name}.zip")
    size = sum(path.stat().st_size for path in files)
    with writing(target, size), atomic_file(target) as draft, ZipFile(draft, "w", ZIP_DEFLATED) as archive:
        for path in files:
            how = ZIP_STORED if path.suffix in STORED else None  # else as the archive
            archive.write(path, Path(folder.name) / path.relative_to(folder), how)
    return target


def download(file: str | Path) -> None:
    """In Colab, hand the file to the browser; elsewhere, say where it lies."""
    file = Path(file).resolve()
    if where() == "colab":
        from google.colab import files

        files.download(str(file))
    else:
        print(f"{file} ({file.stat().st_size / 1e6:.1f} MB)")

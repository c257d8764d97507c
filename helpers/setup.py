"""Where are we running, what is missing, and is this machine ready?

    install_what_is_missing()       # the first cell: install what is missing, upgrade nothing, need no restart
    check_setup()                   # one line for each thing that training needs: [OK], [WARN] or [FAIL], and what to do
    mount_drive()                   # in Colab: keep copies of runs on Google Drive

The standard library only, because this is imported before anything is installed; everything else is imported where it is used.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from importlib import invalidate_caches
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).parent.parent
HUB = "https://huggingface.co"
PYTORCH_PAGE = "https://pytorch.org/get-started/locally/"
DRIVE = Path("/content/drive/MyDrive")  # where Colab mounts Google Drive
TOKEN_GOES_INTO = {
    "colab": "Colab's secrets (the key icon on the left) under the name HF_TOKEN, with notebook access switched on",
    "kaggle": "Kaggle's secrets (Add-ons > Secrets) under the label HF_TOKEN, attached to this notebook",
    "local": "the environment variable HF_TOKEN, before Jupyter starts",
}


def where() -> str:
    """ "colab", "kaggle" or "local"."""
    if "google.colab" in sys.modules:
        return "colab"
    return "kaggle" if "KAGGLE_KERNEL_RUN_TYPE" in os.environ else "local"


# ------------------------------------------------------------------------------------------------------ what is missing

TORCHAO_THAT_PEFT_ACCEPTS = (0, 16)  # PEFT 0.19 to 0.21 raise an ImportError on older ones (peft/import_utils.py)


def numbers(text: str) -> tuple[int, ...]:
    """ "2.11.0+cu128" -> (2, 11, 0): enough to compare releases."""
    return tuple(int(part) for part in re.findall(r"\d+", text.partition("+")[0])[:3])


def requirements() -> dict[str, str]:
    """Package -> lowest version that we support, from requirements.txt."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    found = (re.match(r"([\w.-]+)>=([\w.]+)", line) for line in lines)
    return {match[1]: match[2] for match in found if match}


def installed(package: str) -> str | None:
    """The version that is installed; None if it is not."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def install_what_is_missing() -> None:
    """Install the requirements that are not there. Running it again does nothing.

    Colab and Kaggle ship torch, transformers, PEFT and most else, and upgrading one of those under a running notebook breaks it. So
    what is there stays, and what is missing comes in the version that we test (constraints.txt), there without its own dependencies.

    Raises:
        RuntimeError: torch itself is missing, or pip failed; says which command to run.
    """
    missing = [package for package in requirements() if installed(package) is None]
    if "torch" in missing:
        raise RuntimeError(
            f"PyTorch is not installed. Take the command for your system from {PYTORCH_PAGE}, "
            "then run: pip install -r requirements.txt -c constraints.txt"
        )
    hosted = where() != "local"
    if hosted and _torchao_breaks_peft():
        print("Removing torchao: PEFT refuses this old version, and nothing here needs it.")
        pip("uninstall", "--yes", "torchao")
    if missing:
        print(f"Installing {', '.join(missing)} ...")
        pip("install", *["--no-deps"] * hosted, "--constraint", str(ROOT / "constraints.txt"), *missing)
        invalidate_caches()


def _torchao_breaks_peft() -> bool:
    return numbers(installed("torchao") or "999") < TORCHAO_THAT_PEFT_ACCEPTS


def pip(*arguments: str) -> None:
    """Run pip. Raises `RuntimeError` with its last line if it fails."""
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:] or ["no message"]
        raise RuntimeError(f"pip {' '.join(arguments)} failed: {said[0]}. Check the network, then run this cell again.")


# --------------------------------------------------------------------------------------------------- Hub, token, Drive


def hub_reachable(seconds: float = 3.0) -> bool:
    """Does the Hugging Face Hub (or the mirror named in `HF_ENDPOINT`) answer? False in offline mode (`HF_HUB_OFFLINE`)."""
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return False
    try:
        request = urllib.request.Request(os.environ.get("HF_ENDPOINT", HUB), method="HEAD")
        urllib.request.urlopen(request, timeout=seconds).close()
    except urllib.error.HTTPError as error:
        return error.code < 500  # it answered, if only to say that it does not like this question
    except (OSError, ValueError):
        return False
    return True


def is_network_error(error: BaseException) -> bool:
    """Did the Hub not answer at all? huggingface_hub 1 raises httpx's errors, huggingface_hub 2 those of httpx2."""
    library = type(error).__module__.partition(".")[0]
    return isinstance(error, ConnectionError) or library in ("httpx", "httpx2", "httpcore", "httpcore2")


def find_token() -> bool:
    """Is there a Hub token? Looks in the environment, the Hub's own file, Colab's secrets and Kaggle's; never shows or stores it.

    Kaggle's secret is put into this process's environment, where `huggingface_hub` looks; it finds all others by itself.
    """
    with suppress(Exception):  # no such secret, no network, or not attached to this notebook: all mean "no token"
        if where() == "kaggle" and not os.environ.get("HF_TOKEN"):
            from kaggle_secrets import UserSecretsClient

            os.environ["HF_TOKEN"] = UserSecretsClient().get_secret("HF_TOKEN")
    with suppress(Exception):  # Colab's secret store may refuse, time out, or know no such name
        from huggingface_hub import get_token

        return bool(get_token())
    return False


def backup_dir() -> Path | None:
    """A folder for copies of runs that outlives the session: on Google Drive if it is mounted (mounting it is the opt-in)."""
    return DRIVE / "finetune-kit" / "runs" if os.path.isdir(DRIVE) else None  # Path.is_dir raises if the mount has died


def mount_drive() -> bool:
    """Mount Google Drive in Colab, so that runs are copied there; True if it worked. Colab asks for permission in a window.

    It often fails (a closed window, an organization's rules), and training works without it: an error is told, not raised.
    """
    if where() != "colab":
        print("[WARN] Google Drive can be mounted in Colab only. Runs stay in runs/ on this machine.")
        return False
    try:
        from google.colab import drive

        drive.mount(str(DRIVE.parent))  # where it is mounted already, this does nothing
    except Exception as error:  # "mount failed", credentials, a folder in the way: whatever Colab raises
        print(
            f"[WARN] Google Drive could not be mounted ({error}). Training works without it: download what you want to "
            "keep before the session ends (helpers.export: zip_folder, download)."
        )
    return backup_dir() is not None


# ------------------------------------------------------------------------------------------------ is this machine ready?

Line = tuple[str, str]  # ("OK", "WARN" or "FAIL"; what was found, and what to do about it)
GIB = 2**30
LITTLE_GPU_MEMORY = 5.5 * GIB  # a 1.5B model in NF4 trains in about this much
LITTLE_RAM = 4 * GIB  # what the quickstart needs without a GPU
LITTLE_DISK = 6 * GIB  # a 3B model in 16 bit
NO_GPU = {
    "colab": "Runtime > Change runtime type > T4 GPU, then run the first cell again",
    "kaggle": "Settings > Accelerator > GPU T4 x2, then run the first cell again",
    "local": "no NVIDIA card is visible here",
}
CLOSE_OTHERS = "close what uses the card (nvidia-smi shows it), or restart the kernel"
OTHER_TORCH = f"pip uninstall -y torch, then the command that {PYTORCH_PAGE} gives"
# Words in what torch says of a card that it cannot use -> what to do
ADVICE = {
    "not installed": OTHER_TORCH,
    "not compiled with CUDA": OTHER_TORCH,
    "driver": f"update the NVIDIA driver (https://www.nvidia.com/drivers) and restart; or {OTHER_TORCH} for an older CUDA",
    "no kernel image": f"on Kaggle, choose GPU T4 x2 as the accelerator; elsewhere, {OTHER_TORCH} for an older version",
    "": CLOSE_OTHERS,
}


def check_setup() -> None:
    """Print what is ready and what is not: [FAIL] must be mended before training, [WARN] may be."""
    lines = [*_gpu_lines(), ("OK", f"Python {platform.python_version()} on {platform.system()} ({where()})")]
    for level, text in [*lines, *_package_lines(), *_room_lines(), *_network_lines()]:
        print(f"[{level}]".ljust(7) + text)


def _ok_if(good: bool, text: str, otherwise: str) -> Line:
    return ("OK", text) if good else ("WARN", f"{text}: {otherwise}")


def _gpu_lines() -> Iterator[Line]:
    cards, trouble = _nvidia_cards(), _trouble_with_cuda()
    if trouble and cards:
        advice = next(advice for words, advice in ADVICE.items() if words in trouble)
        yield "FAIL", f"{cards[0]} is here, but torch cannot use it ({trouble}): {advice}"
        return
    if trouble:
        without = "Without one, the notebooks train the bundled 135M model on the CPU, which works now"
        yield "WARN", f"no GPU: {NO_GPU[where()]}. {without}"
        return
    from helpers.hardware import detect_gpu

    gpu = detect_gpu()
    memory = f"{gpu.name}: {gpu.free_bytes / GIB:.1f} GiB free of {gpu.total_bytes / GIB:.1f}"
    yield _ok_if(gpu.free_bytes >= LITTLE_GPU_MEMORY, memory, CLOSE_OTHERS)
    if len(cards) > 1:
        share = "export_script(run) of helpers.export writes a script for `accelerate launch`, which shares one run over all"
        second = "or the second trains another run, started with CUDA_VISIBLE_DEVICES=1"
        yield "OK", f"{len(cards)} cards: this process trains on the first. {share}; {second}"


def _nvidia_cards() -> list[str]:
    """Names of the cards, from the driver's own tool, which works without torch."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):  # no such tool, or a driver that hangs
        return []
    return done.stdout.strip().splitlines() if done.returncode == 0 else []


def _trouble_with_cuda() -> str:
    """What torch says when it is to calculate on the card, in one sentence; empty if it can."""
    try:
        import torch

        torch.ones(1, device="cuda").add_(1).item()
    except ImportError:
        return "torch is not installed"
    except Exception as error:  # no driver, one that is too old, a card that this torch was not built for, a CPU build
        return re.split(r"\.\s|\n", str(error))[0]
    return ""


def _package_lines() -> list[Line]:
    fix = "run the first cell again" if where() != "local" else "pip install -r requirements.txt -c constraints.txt"
    lines, good = [], []
    for package, lowest in requirements().items():
        found = installed(package)
        if found is None:
            lines.append(("FAIL", f"{package} is missing: {fix}"))
        elif numbers(found) < numbers(lowest):
            lines.append(("WARN", f"{package} {found} is older than the tested {lowest}: {fix} if something fails"))
        else:
            good.append(f"{package} {found}")
    if _torchao_breaks_peft():
        lines.append(("FAIL", "this torchao makes PEFT fail, and nothing here needs it: pip uninstall -y torchao"))
    return [*lines, ("OK", ", ".join(good))]


def _room_lines() -> Iterator[Line]:
    """RAM and disk."""
    import psutil

    ram, disk = psutil.virtual_memory().available, shutil.disk_usage(".").free
    yield _ok_if(ram >= LITTLE_RAM, f"{ram / GIB:.1f} GiB of RAM free", "close other programs, or restart the kernel")
    a_3b_model = f"enough for the bundled model; a 3B model needs {LITTLE_DISK / GIB:.0f}"
    yield _ok_if(disk >= LITTLE_DISK, f"{disk / GIB:.1f} GiB of disk free", a_3b_model)


def _network_lines() -> Iterator[Line]:
    no_hub = "the Hugging Face Hub does not answer: models from a local folder and the bundled one still work"
    yield ("OK", "the Hugging Face Hub answers") if hub_reachable() else ("WARN", no_hub)
    no_token = f"no Hub token; only gated models need one, in {TOKEN_GOES_INTO[where()]}"
    yield "OK", "a Hub token is there" if find_token() else no_token
    silent = os.environ.get("HF_HUB_DISABLE_TELEMETRY", "0") != "0"
    yield (
        "OK",
        "telemetry is off (HF_HUB_DISABLE_TELEMETRY)"
        if silent
        else "telemetry of TRL and the Hub is on, as you set it",
    )
    if where() == "colab":
        how = "mount it to keep runs after this session (from helpers.setup import mount_drive; mount_drive())"
        yield "OK", "Drive is mounted: runs are copied there" if backup_dir() else f"Drive is not mounted: {how}"

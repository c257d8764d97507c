"""The first cell's second half: install what is missing, upgrade nothing, need no restart.

    install_what_is_missing()

Free Colab and Kaggle ship torch, transformers, PEFT and most else. Upgrading one of those under a running notebook is how
notebooks break, so what is there stays as it is; what is missing comes in the version that we test (constraints.txt), without its own
dependencies. Standard library only, because this runs before anything else may be imported.

Where are we running, and what can be reached from here?

Is this machine ready? One line for each thing that training needs, with what to do where it is not.

    check_setup()

`gather` looks around, `judge` decides: the second is a pure function, so every advice can be tested without the machine it is for.
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
from dataclasses import dataclass, field
from importlib import invalidate_caches
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from helpers.hardware import GIB, MIB, detect_gpu

ROOT = Path(__file__).parent.parent
TORCHAO_THAT_PEFT_ACCEPTS = (0, 16)  # PEFT 0.19 to 0.21 raise an ImportError on older ones (peft/import_utils.py)


def is_hosted() -> bool:
    """Is this Colab or Kaggle, where the runtime belongs to somebody else and ends by itself?"""
    return "google.colab" in sys.modules or "KAGGLE_KERNEL_RUN_TYPE" in os.environ


def numbers(text: str) -> tuple[int, ...]:
    """ "2.11.0+cu128" -> (2, 11, 0): enough to compare releases."""
    return tuple(int(part) for part in re.findall(r"\d+", text.partition("+")[0])[:3])


def requirements() -> dict[str, tuple[int, ...]]:
    """Package -> lowest version that we support, from requirements.txt."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    found = (re.match(r"([\w.-]+)>=([\w.]+)", line) for line in lines)
    return {match[1]: numbers(match[2]) for match in found if match}


def tested(package: str) -> str:
    """`package==version` as constraints.txt has it."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return next(line.strip() for line in lines if line.lower().startswith(f"{package.lower()}=="))


def installed(package: str) -> tuple[int, ...] | None:
    try:
        return numbers(version(package))
    except PackageNotFoundError:
        return None


def install_what_is_missing() -> None:
    """Install the requirements that are not there. Running it again does nothing.

    Raises:
        RuntimeError: torch itself is missing, or pip failed; says which command to run.
    """
    missing = [package for package in requirements() if installed(package) is None]
    if "torch" in missing:
        raise RuntimeError(
            "PyTorch is not installed. Take the command for your system from https://pytorch.org/get-started/locally/, "
            "then run: pip install -r requirements.txt -c constraints.txt"
        )
    if is_hosted():
        _remove_old_torchao()
    if missing:
        wanted = [tested(package) for package in missing]
        print(f"Installing {', '.join(wanted)} ...")
        alone = ["--no-deps"] if is_hosted() else ["--constraint", str(ROOT / "constraints.txt")]
        _pip("install", *alone, *wanted)
        invalidate_caches()
    stale = [name for name in requirements() if _is_stale(name)]
    if stale:
        print(f"Restart once: {', '.join(stale)} was imported before it was installed in the right version.")


def _remove_old_torchao() -> None:
    found = installed("torchao")
    if found is not None and found < TORCHAO_THAT_PEFT_ACCEPTS:
        print("Removing torchao: PEFT refuses this old version, and nothing here needs it.")
        _pip("uninstall", "--yes", "torchao")


def _is_stale(package: str) -> bool:
    """Was the package imported in a version that is not the one installed now?"""
    loaded = getattr(sys.modules.get(package), "__version__", None)
    return loaded is not None and installed(package) is not None and numbers(loaded) != installed(package)


def _pip(*arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:] or ["no message"]
        raise RuntimeError(f"pip {' '.join(arguments)} failed: {said[0]}. Check the network, then run this cell again.")


HUB = "https://huggingface.co"
DRIVE = Path("/content/drive/MyDrive")  # where Colab mounts Google Drive
TOKEN_GOES_INTO = {
    "colab": "Colab's secrets (the key icon on the left) under the name HF_TOKEN, with notebook access switched on",
    "kaggle": "Kaggle's secrets (Add-ons > Secrets) under the label HF_TOKEN, attached to this notebook",
    "local": "the environment variable HF_TOKEN, before Jupyter starts",
}


def hub_reachable(seconds: float = 3.0) -> bool:
    """Does the Hugging Face Hub (or the mirror named in `HF_ENDPOINT`) answer? False in offline mode (`HF_HUB_OFFLINE`)."""
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return False
    request = urllib.request.Request(os.environ.get("HF_ENDPOINT", HUB), method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=seconds).close()
    except urllib.error.HTTPError as error:
        return error.code < 500  # it answered, if only to say that it does not like this question
    except (OSError, ValueError):
        return False
    return True


def is_network_error(error: Exception) -> bool:
    """Did the Hub not answer at all? huggingface_hub 1 raises httpx's errors, huggingface_hub 2 those of httpx2."""
    return isinstance(error, ConnectionError) or type(error).__module__.partition(".")[0] in (
        "httpx",
        "httpx2",
        "httpcore",
        "httpcore2",
    )


def drive_is_there() -> bool:
    """Is Google Drive mounted, and does it answer? (A mount that has died raises errors instead of saying no.)"""
    return os.path.isdir(DRIVE)


def backup_dir() -> Path | None:
    """A folder for copies of runs that outlives the session: on Google Drive if it is mounted (mounting it is the opt-in)."""
    return DRIVE / "finetune-kit" / "runs" if drive_is_there() else None


def mount_drive() -> bool:
    """Mount Google Drive in Colab, so that runs are copied there; True if it worked. Colab asks for permission in a window.

    It often fails (a closed window, an organization's rules, Google's side), and training works without it, so an error is told, not raised.
    """
    if drive_is_there():
        return True
    if where() != "colab":
        print("[WARN] Google Drive can be mounted in Colab only. Runs stay in runs/ on this machine.")
        return False
    try:
        from google.colab import drive

        drive.mount(str(DRIVE.parent))
    except (
        Exception
    ) as error:  # ValueError("mount failed"), credentials, a folder in the way: Colab raises what it likes
        print(
            f"[WARN] Google Drive could not be mounted ({error}). Training works without it: download what you want to keep before the "
            "session ends (helpers.export: zip_folder, download)."
        )
        return False
    return drive_is_there()


def where() -> str:
    """ "colab", "kaggle" or "local"."""
    if "google.colab" in sys.modules:
        return "colab"
    return "kaggle" if "KAGGLE_KERNEL_RUN_TYPE" in os.environ else "local"


def find_token() -> bool:
    """Is there a Hub token? Looks in the environment, the Hub's own file, Colab's secrets and Kaggle's; never shows or stores it.

    Kaggle's secret is put into this process's environment, where `huggingface_hub` looks; it finds all others by itself.
    """
    if where() == "kaggle" and not os.environ.get("HF_TOKEN"):
        try:
            from kaggle_secrets import UserSecretsClient

            os.environ["HF_TOKEN"] = UserSecretsClient().get_secret("HF_TOKEN")
        except Exception:  # no such secret, no network, or not attached to this notebook: all mean "no token"
            pass
    try:
        from huggingface_hub import get_token

        return bool(get_token())
    except Exception:  # Colab's secret store may refuse, time out, or know no such name
        return False


LITTLE_GPU_MEMORY = 5.5 * GIB  # a 1.5B model in NF4 trains in about this much
LITTLE_RAM = 4 * GIB  # what the quickstart needs without a GPU
LITTLE_DISK = 6 * GIB  # a 3B model in 16 bit
PYTORCH_PAGE = "https://pytorch.org/get-started/locally/"


@dataclass(frozen=True)
class Facts:
    """What `gather` found. Sizes in bytes; None where there is nothing to tell."""

    place: str = "local"
    """"colab", "kaggle" or "local"."""
    system: str = "Linux"
    python: tuple[int, ...] = (3, 11)
    versions: dict[str, str | None] = field(default_factory=dict)
    cards: list[str] = field(default_factory=list)
    """Names of the NVIDIA cards that the driver sees."""
    driver_cuda: tuple[int, ...] | None = None
    """Newest CUDA that the driver supports."""
    torch_cuda: tuple[int, ...] | None = None
    """CUDA that torch was built for; None for a CPU build."""
    cuda_works: bool = False
    capability: tuple[int, int] | None = None
    architectures: list[str] = field(default_factory=list)
    """What `torch.cuda.get_arch_list()` says: sm_75, ..., compute_120."""
    gpu_free: int = 0
    gpu_total: int = 0
    ram_free: int = 0
    disk_free: int = 0
    hub: bool = False
    token: bool = False
    drive: bool = False


@dataclass(frozen=True)
class Line:
    status: str
    """"OK", "WARN" or "FAIL"."""
    text: str

    def __str__(self) -> str:
        return f"[{self.status}]".ljust(7) + self.text


def check_setup() -> None:
    """Print what is ready and what is not: [FAIL] must be mended before training, [WARN] may be."""
    print(*judge(gather()), sep="\n")


def judge(facts: Facts) -> list[Line]:
    """Facts -> lines, most important first."""
    return [*_gpu(facts), _python(facts), *_packages(facts), _memory(facts), _disk(facts), *_network(facts)]


def _gpu(facts: Facts) -> list[Line]:
    if not facts.cards and not facts.cuda_works:
        switch = {
            "colab": "Runtime > Change runtime type > T4 GPU, then run the first cell again",
            "kaggle": "Settings > Accelerator > GPU T4 x2, then run the first cell again",
            "local": "no NVIDIA card is visible here",
        }[facts.place]
        return [
            Line(
                "WARN",
                f"no GPU: {switch}. Without one, the notebooks train the bundled 135M model on the CPU, which works now",
            )
        ]
    card = facts.cards[0] if facts.cards else "a CUDA card"
    if facts.torch_cuda is None:
        return [
            Line(
                "FAIL",
                f"{card} is here, but torch is a CPU build: pip uninstall -y torch, then the command that {PYTORCH_PAGE} gives",
            )
        ]
    if not facts.cuda_works:
        if facts.driver_cuda and facts.driver_cuda[:1] < facts.torch_cuda[:1]:
            return [
                Line(
                    "FAIL",
                    f"{card}: its driver supports CUDA {_dotted(facts.driver_cuda)}, torch needs {_dotted(facts.torch_cuda)}: "
                    f"update the NVIDIA driver (https://www.nvidia.com/drivers) and restart; or pip uninstall -y torch, then the command "
                    f"for CUDA {facts.driver_cuda[0]} that {PYTORCH_PAGE} gives",
                )
            ]
        return [
            Line("FAIL", f"{card} is here, but torch cannot use it: run nvidia-smi; if that works, restart the kernel")
        ]
    if not _runs_on(facts.capability, facts.architectures):
        sm = "sm_{}{}".format(*facts.capability)
        other = (
            "choose GPU T4 x2 as the accelerator"
            if facts.place == "kaggle"
            else f"pip uninstall -y torch, then the command for an older version that {PYTORCH_PAGE} gives"
        )
        return [Line("FAIL", f"{card} ({sm}) is not among the cards that this torch was built for: {other}")]
    memory = f"{card}: {facts.gpu_free / GIB:.1f} GiB free of {facts.gpu_total / GIB:.1f}"
    lines = [
        Line("OK", memory)
        if facts.gpu_free >= LITTLE_GPU_MEMORY
        else Line("WARN", f"{memory}: close what uses the card (nvidia-smi shows it), or restart the kernel")
    ]
    if len(facts.cards) > 1:
        lines.append(
            Line(
                "OK",
                f"{len(facts.cards)} cards: this process trains on the first. helpers.export.export_script(run) writes a script and the files for "
                "`accelerate launch`, which shares one run over both; or the second trains another run, started with CUDA_VISIBLE_DEVICES=1",
            )
        )
    return lines


def _runs_on(capability: tuple[int, int] | None, architectures: list[str]) -> bool:
    """Binary code runs on later cards of the same generation; `compute_` code is translated for any later card."""
    if capability is None or not architectures:
        return True
    for name in architectures:
        kind, _, digits = name.partition("_")
        digits = re.sub(r"\D", "", digits)
        built_for = (int(digits[:-1]), int(digits[-1]))
        if built_for <= capability and (kind == "compute" or built_for[0] == capability[0]):
            return True
    return False


def _python(facts: Facts) -> Line:
    if facts.python < (3, 10):
        return Line("FAIL", f"Python {_dotted(facts.python)}: 3.10 or newer is needed; make a new environment with it")
    return Line("OK", f"Python {_dotted(facts.python)} on {facts.system} ({facts.place})")


def _packages(facts: Facts) -> list[Line]:
    command = (
        "run the first cell again" if facts.place != "local" else "pip install -r requirements.txt -c constraints.txt"
    )
    lines, good = [], []
    for package, lowest in requirements().items():
        found = facts.versions.get(package)
        if found is None:
            lines.append(Line("FAIL", f"{package} is missing: {command}"))
        elif numbers(found) < lowest:
            lines.append(
                Line(
                    "WARN",
                    f"{package} {found} is older than the {_dotted(lowest)} that we test: {command} if something fails",
                )
            )
        else:
            good.append(f"{package} {found}")
    torchao = facts.versions.get("torchao")
    if torchao is not None and numbers(torchao) < TORCHAO_THAT_PEFT_ACCEPTS:
        lines.append(
            Line("FAIL", f"torchao {torchao} makes PEFT fail, and nothing here needs it: pip uninstall -y torchao")
        )
    return [*lines, *([Line("OK", ", ".join(good))] if good else [])]


def _memory(facts: Facts) -> Line:
    enough = facts.ram_free >= LITTLE_RAM
    text = f"{facts.ram_free / GIB:.1f} GiB of RAM free"
    return Line("OK", text) if enough else Line("WARN", f"{text}: close other programs, or restart the kernel")


def _disk(facts: Facts) -> Line:
    enough = facts.disk_free >= LITTLE_DISK
    text = f"{facts.disk_free / GIB:.1f} GiB of disk free"
    return (
        Line("OK", text)
        if enough
        else Line("WARN", f"{text}: enough for the bundled model; a 3B model needs {LITTLE_DISK / GIB:.0f}")
    )


def _network(facts: Facts) -> list[Line]:
    lines = [
        Line("OK", "the Hugging Face Hub answers")
        if facts.hub
        else Line(
            "WARN", "the Hugging Face Hub does not answer: models from a local folder and the bundled one still work"
        )
    ]
    missing = f"no Hub token; only gated models need one, in {TOKEN_GOES_INTO[facts.place]}"
    lines.append(Line("OK", "a Hub token is there" if facts.token else missing))
    if facts.place == "colab":
        lines.append(
            Line("OK", "Drive is mounted: runs are copied there")
            if facts.drive
            else Line(
                "OK",
                "Drive is not mounted: mount it to keep runs after this session (from helpers.setup import mount_drive; mount_drive())",
            )
        )
    return lines


def _dotted(parts: tuple[int, ...]) -> str:
    return ".".join(map(str, parts))


# ------------------------------------------------------------------------------------------------------ look around


def gather() -> Facts:
    """Look at this machine. Every question may fail without stopping the others."""
    cards, driver = _nvidia_smi()
    torch_cuda, cuda_works, capability, architectures = None, False, None, []
    gpu = None
    try:
        import torch

        torch_cuda = numbers(torch.version.cuda) if torch.version.cuda else None
        cuda_works = torch.cuda.is_available()
        if cuda_works:
            capability, architectures = torch.cuda.get_device_capability(0), torch.cuda.get_arch_list()
        gpu = detect_gpu()
    except ImportError:
        pass
    names = [*requirements(), "torchao"]
    return Facts(
        place=where(),
        system=platform.system(),
        python=sys.version_info[:2],
        versions={name: _version(name) for name in names},
        cards=cards,
        driver_cuda=driver,
        torch_cuda=torch_cuda,
        cuda_works=cuda_works,
        capability=capability,
        architectures=architectures,
        gpu_free=gpu.free_bytes if gpu else 0,
        gpu_total=gpu.total_bytes if gpu else 0,
        ram_free=gpu.ram_free_bytes if gpu else 0,
        disk_free=shutil.disk_usage(".").free // MIB * MIB,
        hub=hub_reachable(),
        token=find_token(),
        drive=drive_is_there(),
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _nvidia_smi() -> tuple[list[str], tuple[int, ...] | None]:
    """(names of the cards, newest CUDA of the driver), by the driver's own tool, which works without torch."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return [], None
    try:
        names = subprocess.run(
            [tool, "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, timeout=20
        )
        banner = subprocess.run([tool], capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return [], None
    cuda = re.search(r"CUDA (?:UMD )?Version:\s*([\d.]+)", banner)
    return (names.stdout.strip().splitlines() if names.returncode == 0 else []), (numbers(cuda[1]) if cuda else None)

"""Is this machine ready? One line for each thing that training needs, with what to do where it is not.

    check_setup()

`gather` looks around, `judge` decides: the second is a pure function, so every advice can be tested without the machine it is for.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version

from helpers.bootstrap import TORCHAO_THAT_PEFT_ACCEPTS, numbers, requirements
from helpers.hardware import GIB, MIB, detect_gpu
from helpers.runtime import TOKEN_GOES_INTO, drive_is_there, find_token, hub_reachable, where

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
                f"no GPU: {switch}. Without one, the notebooks train the embedded 135M model on the CPU, which works now",
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
        else Line("WARN", f"{text}: enough for the embedded model; a 3B model needs {LITTLE_DISK / GIB:.0f}")
    )


def _network(facts: Facts) -> list[Line]:
    lines = [
        Line("OK", "the Hugging Face Hub answers")
        if facts.hub
        else Line(
            "WARN", "the Hugging Face Hub does not answer: models from a local folder and the embedded one still work"
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
                "Drive is not mounted: mount it to keep runs after this session (from helpers.runtime import mount_drive; mount_drive())",
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

"""Wheels for another system or Python version, with everything that they need there.

    download(["torch", "pandas"], Path("wheels"), "win_amd64", "3.12", Path("constraints.txt"), [])

`pip download --platform` alone decides by the machine it runs on which requirements count (colorama on Windows, say). So each wheel
is fetched alone, and what it asks for on the other system is read from its metadata, until nothing is missing.
"""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from email.parser import HeaderParser
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

SYSTEMS = {
    "win": ("win32", "Windows", "nt"),
    "macosx": ("darwin", "Darwin", "posix"),
    "manylinux": ("linux", "Linux", "posix"),
    "linux": ("linux", "Linux", "posix"),
}
# Versions for which wheels may be tagged: macosx_14_0, manylinux_2_28.
MACOS, GLIBC = range(26, 10, -1), range(41, 4, -1)
DOWNLOAD = [
    sys.executable,
    *["-m", "pip", "download", "--quiet", "--only-binary=:all:", "--disable-pip-version-check", "--dest"],
]


def kind(platform: str) -> str:
    found = next((name for name in SYSTEMS if platform.startswith(name)), None)
    if found is None:
        raise SystemExit(
            f"{platform!r} is not a platform tag: use win_amd64, macosx_14_0_arm64, manylinux_2_28_x86_64 or the like"
        )
    return found


def system_of(platform: str) -> str:
    """What `platform.system()` answers there."""
    return SYSTEMS[kind(platform)][1]


def tags(platform: str) -> list[str]:
    """The tag itself and the older ones that such a machine runs too."""
    kind(platform)  # refuses what is none
    match = re.fullmatch(r"(macosx|manylinux)_(\d+)_(\d+)_(\w+)", platform)
    if match is None:
        return [platform]
    family, major, minor, machine = match[1], int(match[2]), int(match[3]), match[4]
    if family == "macosx":
        return [
            f"macosx_{version}_0_{name}" for version in MACOS if version <= major for name in (machine, "universal2")
        ]
    return [f"manylinux_2_{version}_{machine}" for version in GLIBC if version <= minor] + [f"manylinux2014_{machine}"]


def environment(platform: str, python: str) -> dict[str, str]:
    """The values that markers in requirements ask for, as they are on the other machine."""
    sys_platform, system, os_name = SYSTEMS[kind(platform)]
    machine = (
        "AMD64"
        if platform == "win_amd64"
        else "arm64"
        if platform.endswith("arm64")
        else platform.rpartition("linux_")[2]
    )
    machine = "x86_64" if machine.endswith("x86_64") else machine
    return {
        "sys_platform": sys_platform,
        "platform_system": system,
        "os_name": os_name,
        "platform_machine": machine,
        "python_version": python,
        "python_full_version": f"{python}.0",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
        "extra": "",
    }


def requirements(file: Path, more: list[str]) -> list[str]:
    lines = (line.partition("#")[0].strip() for line in file.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line and not line.startswith("-")] + more


def pins(constraints: Path) -> dict[str, str]:
    """Name -> `name==version`."""
    lines = [line.strip() for line in constraints.read_text(encoding="utf-8").splitlines() if "==" in line]
    return {canonicalize_name(line.partition("==")[0]): line for line in lines}


def wanted_by(wheel: Path, extras: set[str], values: dict[str, str]) -> list[Requirement]:
    """What a wheel requires in an environment, with these of its extras."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(
            name for name in archive.namelist() if name.count("/") == 1 and name.endswith(".dist-info/METADATA")
        )
        lines = HeaderParser().parsestr(archive.read(name).decode("utf-8")).get_all("Requires-Dist") or []
    found = [Requirement(line) for line in lines]
    return [
        need
        for need in found
        if need.marker is None or any(need.marker.evaluate(values | {"extra": extra}) for extra in ["", *extras])
    ]


def download(roots: list[str], wheels: Path, platform: str, python: str, constraints: Path, index: list[str]) -> None:
    """Fill `wheels` with the roots and with all that they need on the other machine.

    Raises:
        SystemExit: there is no wheel of something for that machine, or only one of another version; says of what.
    """
    pinned, values = pins(constraints), environment(platform, python)
    extras: dict[str, set[str]] = {}
    waiting = [Requirement(root) for root in roots]
    while waiting:
        new = {}
        for need in waiting:
            name = canonicalize_name(need.name)
            if name not in extras or need.extras - extras[name]:
                extras[name] = extras.get(name, set()) | need.extras
                new[name] = need
        have = wheels_by_name(wheels)
        missing = [pinned.get(name, f"{need.name}{need.specifier}") for name, need in new.items() if name not in have]
        if missing:
            _pip_download(missing, wheels, platform, python, index)
        have = wheels_by_name(wheels)
        for need in waiting:
            found = parse_wheel_filename(have[canonicalize_name(need.name)].name)[1]
            if not need.specifier.contains(found, prereleases=True):
                raise SystemExit(
                    f"{need} is needed on {platform}, and {constraints.name} has {found}: this set of versions fits no such machine"
                )
        waiting = [need for name in new for need in wanted_by(have[name], extras[name], values)]


def wheels_by_name(folder: Path) -> dict[str, Path]:
    return {parse_wheel_filename(wheel.name)[0]: wheel for wheel in folder.glob("*.whl")}


def _pip_download(names: list[str], wheels: Path, platform: str, python: str, index: list[str]) -> None:
    for_python = ["--no-deps", "--python-version", python, "--implementation", "cp"]
    command = [*DOWNLOAD, str(wheels), *for_python, *index, *names]
    command += [word for tag in tags(platform) for word in ("--platform", tag)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "ERROR" in line]
        raise SystemExit(
            "\n".join([f"No wheels for {platform}, Python {python}, of some of: {', '.join(names)}", *errors[-3:]])
        )

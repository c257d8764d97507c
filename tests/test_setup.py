"""The first cell and the check of the machine, for machines that we do not have: nothing is upgraded, each trouble gets its advice."""

import re
import subprocess
import sys
import types
from unittest.mock import Mock

import nbformat
import pytest

from helpers import setup
from helpers.hardware import GIB, Gpu

# --------------------------------------------------------------------------------------------------- install what is missing


@pytest.fixture
def colab(monkeypatch):
    monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))


@pytest.fixture
def pip(monkeypatch):
    """Everything that pip is asked to do; and a table of what is installed, which starts with all requirements."""
    asked = []
    table = setup.requirements()

    def run(command, *arguments):
        asked.append((command, *arguments))
        for package in arguments:
            if command == "uninstall":
                table.pop(package, None)
            elif package in setup.requirements():
                table[package] = setup.requirements()[package]

    monkeypatch.setattr(setup, "pip", run)
    monkeypatch.setattr(setup, "installed", table.get)
    return types.SimpleNamespace(asked=asked, table=table)


CONSTRAINTS = str(setup.ROOT / "constraints.txt")


def test_colab_gets_only_what_it_lacks_without_dependencies_and_once(pip, colab, capsys):
    for name in ("trl", "bitsandbytes", "gguf"):
        del pip.table[name]
    pip.table |= {"torchao": "0.10.0", "transformers": "4.0.0"}  # an old version that the runtime ships is left alone
    setup.install_what_is_missing()
    assert pip.asked == [
        ("uninstall", "--yes", "torchao"),
        ("install", "--no-deps", "--constraint", CONSTRAINTS, "bitsandbytes", "trl", "gguf"),
    ]
    assert "PEFT refuses" in capsys.readouterr().out
    setup.install_what_is_missing()
    assert len(pip.asked) == 2 and capsys.readouterr().out == "", "where nothing is missing, nothing happens"


def test_a_laptop_gets_the_tested_versions_with_dependencies(pip):
    del pip.table["trl"]
    setup.install_what_is_missing()
    assert pip.asked == [("install", "--constraint", CONSTRAINTS, "trl")]


def test_a_machine_without_torch_is_told_where_to_get_it(pip):
    del pip.table["torch"]
    with pytest.raises(RuntimeError, match=r"PyTorch is not installed.*pytorch\.org/get-started"):
        setup.install_what_is_missing()
    assert pip.asked == []


def test_a_failing_pip_says_what_it_said():
    with pytest.raises(RuntimeError, match=r"pip install .*failed: ERROR: No matching distribution.*Check the network"):
        setup.pip("install", "--no-index", "this-package-does-not-exist-anywhere==1")


def test_every_requirement_is_pinned_and_the_pin_satisfies_it():
    lines = (setup.ROOT / "constraints.txt").read_text(encoding="utf-8").lower().splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line)
    for name, lowest in setup.requirements().items():
        assert setup.numbers(pins[name]) >= setup.numbers(lowest), name


def test_it_is_imported_before_anything_is_installed(root):
    """With the standard library only."""
    code = "import sys; sys.path = [p for p in sys.path if 'site-packages' not in p]; import helpers.setup"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_first_cell_clones_where_there_is_no_kit_and_finds_it_the_next_time(root, tmp_path):
    """As in Colab: an empty folder, and the repository somewhere else. Run twice, and once from inside a subfolder."""
    notebook = nbformat.read(root / "notebooks" / "00_quickstart.ipynb", as_version=4)
    cell = next(cell.source for cell in notebook.cells if cell.cell_type == "code")
    remote = tmp_path / "remote" / "finetune-kit"
    subprocess.run(["git", "clone", "--quiet", str(root), str(remote)], check=True)
    subprocess.run(["git", "-C", str(remote), "tag", "--force", "v1"], check=True)
    line = next(line for line in cell.splitlines() if line.startswith("REPO, TAG"))
    code = cell.replace(line, f'REPO, TAG = {remote.as_uri()!r}, "v1"')
    code += "\nprint(ROOT)\nassert 'torch' not in sys.modules"
    start = tmp_path / "content"
    (start / "deep").mkdir(parents=True)
    expected = start / "finetune-kit"
    for folder in (start, start, expected / "notebooks"):
        done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
        # the first thing that a reader sees, and not git's advice on tags
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.split()[-1] == str(expected)


# ------------------------------------------------------------------------------------------------ is this machine ready?


@pytest.fixture
def check(pip, monkeypatch, capsys):
    """What `check_setup` prints in Colab with a T4 where all is well, except for what is given."""

    def run(
        place="colab",
        cards=("Tesla T4",),
        torch_says=None,
        free=(14, 11, 70),
        hub=True,
        token=True,
        drive=True,
        **packages,
    ):
        gpu, ram, disk = (size * GIB for size in free)
        monkeypatch.setitem(sys.modules, "torch", Mock(ones=Mock(side_effect=torch_says)))
        monkeypatch.setattr("helpers.hardware.detect_gpu", lambda: Gpu(cards[0], "cuda", 15 * GIB, gpu))
        monkeypatch.setattr("psutil.virtual_memory", lambda: types.SimpleNamespace(available=ram))
        monkeypatch.setattr("shutil.disk_usage", lambda place: types.SimpleNamespace(free=disk))
        said = {"_nvidia_cards": cards, "where": place, "hub_reachable": hub, "find_token": token, "backup_dir": drive}
        for name, answer in said.items():
            monkeypatch.setattr(setup, name, lambda answer=answer: answer)
        pip.table.update(packages)
        setup.check_setup()
        return capsys.readouterr().out

    return run


def test_a_free_colab_with_a_t4_is_all_ok(check):
    out = check(torchao="0.18.0")  # which PEFT accepts
    assert "[WARN]" not in out and "[FAIL]" not in out
    assert "[OK]   Tesla T4: 14.0 GiB free of 15.0" in out and "Drive is mounted" in out


# What torch raises, word for word, when it is to calculate on a card
CPU_BUILD = AssertionError("Torch not compiled with CUDA enabled")
OLD_DRIVER = RuntimeError(
    "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver"
)
OLD_CARD = RuntimeError("CUDA error: no kernel image is available for execution on the device\nSearch for `cudaError'")
NO_CARD = {"cards": [], "torch_says": CPU_BUILD}


@pytest.mark.parametrize(
    "state, line",
    [
        (NO_CARD, "WARN. no GPU: Runtime > Change runtime type > T4 GPU"),
        (NO_CARD | {"place": "kaggle"}, "WARN. no GPU: Settings > Accelerator"),
        (NO_CARD | {"place": "local"}, "WARN. no GPU: no NVIDIA .*train the bundled 135M model"),
        (
            {"torch_says": CPU_BUILD},
            "FAIL. Tesla T4 is here, but torch cannot use it .Torch not compiled .*: pip uninstall -y torch.*pytorch.org",
        ),
        (
            {"torch_says": ImportError()},
            "FAIL. Tesla T4 is here, but torch cannot use it .torch is not installed.: pip uninstall -y torch",
        ),
        (
            {"torch_says": OLD_DRIVER},
            "FAIL. .*is too old .found version 11040..: update the NVIDIA driver .*; or pip unin",
        ),
        (
            {"torch_says": OLD_CARD},
            "FAIL. .*no kernel image .*the device.: on Kaggle, choose GPU T4 x2 .*pip uninstall",
        ),
        (
            {"torch_says": RuntimeError("CUDA error: unknown error")},
            "FAIL. .*unknown error.: close what .*restart the kernel",
        ),
        ({"free": (3, 11, 70)}, "WARN. .*close what uses the card"),
        ({"cards": ["T4", "T4"]}, "OK. +2 cards: this process trains on the first.*accelerate launch.*second trains"),
        ({"trl": None}, "FAIL. trl is missing: run the first cell again"),
        ({"trl": None, "place": "local"}, "FAIL. trl is missing: pip install -r requirements.txt"),
        ({"peft": "0.1.0"}, "WARN. peft 0.1.0 is older than"),
        ({"torchao": "0.10.0"}, "FAIL. .*torchao makes PEFT fail"),
        ({"free": (14, 2, 70)}, "WARN. 2.0 GiB of RAM free: close other programs"),
        ({"free": (14, 11, 2)}, "WARN. 2.0 GiB of disk free"),
        ({"hub": False}, "WARN. the Hugging Face Hub does not answer"),
        ({"token": False}, "OK. +no Hub token; only gated models need one, in Colab's secrets .the key icon"),
        ({"drive": False}, "OK. +Drive is not mounted"),
        ({}, "OK. +telemetry is off .HF_HUB_DISABLE_TELEMETRY."),
    ],
)
def test_each_trouble_has_its_advice(check, state, line):
    out = check(**state)
    assert re.search(rf"^\[{line}", out, re.MULTILINE), out


def test_it_looks_at_this_machine_without_an_error_and_never_shows_a_token(monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_plantedplantedplanted")
    setup.check_setup()
    out = capsys.readouterr().out
    assert "hf_planted" not in out and "a Hub token is there" in out
    assert all(line.startswith(("[OK]", "[WARN]", "[FAIL]")) for line in out.splitlines())


def test_a_cpu_build_of_torch_says_so_in_the_words_that_have_their_advice():
    torch = pytest.importorskip("torch")
    if torch.version.cuda is None:
        assert "not compiled with CUDA" in setup._trouble_with_cuda()

"""The first cell and the check of the machine, for machines that we do not have: nothing is upgraded, each trouble gets its advice."""

import re
import subprocess
import sys
import types

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

    def run(*arguments):
        asked.append(arguments)
        for name in arguments[1:]:
            package, _, wanted = name.partition("==")
            if arguments[0] == "install" and wanted:
                table[package] = wanted
            elif arguments[0] == "uninstall":
                table.pop(package, None)

    monkeypatch.setattr(setup, "pip", run)
    monkeypatch.setattr(setup, "installed", table.get)
    monkeypatch.setattr(setup, "_is_stale", lambda package: False)
    return types.SimpleNamespace(asked=asked, table=table)


def test_where_nothing_is_missing_nothing_happens(pip, capsys):
    setup.install_what_is_missing()
    assert pip.asked == [] and capsys.readouterr().out == ""


def test_colab_gets_only_what_it_lacks_without_dependencies_and_once(pip, colab, capsys):
    for name in ("trl", "bitsandbytes", "gguf"):
        del pip.table[name]
    pip.table |= {"torchao": "0.10.0", "transformers": "4.0.0"}  # an old version that the runtime ships is left alone
    setup.install_what_is_missing()
    assert pip.asked == [
        ("uninstall", "--yes", "torchao"),
        ("install", "--no-deps", *[setup.tested(name) for name in ("bitsandbytes", "trl", "gguf")]),
    ]
    assert "PEFT refuses" in capsys.readouterr().out
    setup.install_what_is_missing()
    assert len(pip.asked) == 2


def test_a_laptop_gets_the_tested_versions_with_dependencies(pip):
    del pip.table["trl"]
    setup.install_what_is_missing()
    ((command, flag, constraints, wanted),) = pip.asked
    assert (command, flag, wanted) == ("install", "--constraint", setup.tested("trl"))
    assert constraints.endswith("constraints.txt")


def test_a_machine_without_torch_is_told_where_to_get_it(pip):
    del pip.table["torch"]
    with pytest.raises(RuntimeError, match=r"PyTorch is not installed.*pytorch\.org/get-started"):
        setup.install_what_is_missing()
    assert pip.asked == []


def test_what_was_imported_too_early_needs_one_restart(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "trl", types.SimpleNamespace(__version__="0.1.0"))
    setup.install_what_is_missing()
    assert capsys.readouterr().out.startswith("Restart once: trl was imported before")


def test_a_failing_pip_says_what_it_said():
    with pytest.raises(RuntimeError, match=r"pip install .*failed: ERROR: No matching distribution.*Check the network"):
        setup.pip("install", "--no-index", "this-package-does-not-exist-anywhere==1")


def test_every_requirement_is_pinned_and_the_pin_satisfies_it():
    for name, lowest in setup.requirements().items():
        assert setup.numbers(setup.tested(name).partition("==")[2]) >= setup.numbers(lowest), name


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
        driver="13.0",
        built_for="12.8",
        works=True,
        capability=(7, 5),
        gpu_free=14,
        ram=11,
        disk=70,
        hub=True,
        token=True,
        drive=True,
        **packages,
    ):
        cuda = types.SimpleNamespace(
            is_available=lambda: works,
            get_device_capability=lambda device: capability,
            get_arch_list=lambda: ["sm_75", "sm_80", "sm_90", "compute_90"],
        )
        torch = types.SimpleNamespace(version=types.SimpleNamespace(cuda=built_for), cuda=cuda)
        monkeypatch.setitem(sys.modules, "torch", torch)
        monkeypatch.setattr("helpers.hardware.detect_gpu", lambda: Gpu("", "cuda", 15 * GIB, gpu_free * GIB))
        monkeypatch.setattr("psutil.virtual_memory", lambda: types.SimpleNamespace(available=ram * GIB))
        monkeypatch.setattr("shutil.disk_usage", lambda place: types.SimpleNamespace(free=disk * GIB))
        said = {"_nvidia_smi": (list(cards), driver), "where": place, "hub_reachable": hub, "find_token": token}
        for name, answer in (said | {"backup_dir": drive or None}).items():
            monkeypatch.setattr(setup, name, lambda answer=answer: answer)
        pip.table.update(packages)
        setup.check_setup()
        return capsys.readouterr().out

    return run


def test_a_free_colab_with_a_t4_is_all_ok(check):
    out = check(torchao="0.18.0")  # which PEFT accepts
    assert "[WARN]" not in out and "[FAIL]" not in out
    assert "[OK]   Tesla T4: 14.0 GiB free of 15.0" in out and "Drive is mounted" in out


NO_CARD, BROKEN, CPU_BUILD = (
    {"cards": [], "works": False},
    {"works": False},
    {"works": False, "built_for": None},
)
OLD_DRIVER = BROKEN | {"driver": "11.4"}


@pytest.mark.parametrize(
    "state, line",
    [
        (NO_CARD, "WARN. no GPU: Runtime > Change runtime type > T4 GPU"),
        (NO_CARD | {"place": "kaggle"}, "WARN. no GPU: Settings > Accelerator"),
        (NO_CARD | {"place": "local"}, "WARN. no GPU: no NVIDIA .*train the bundled 135M model"),
        (CPU_BUILD, "FAIL. .*torch is a CPU build: pip uninstall -y torch.*pytorch.org/get-started/locally"),
        (OLD_DRIVER, "FAIL. .*driver supports CUDA 11.4, torch needs 12.8: update the NVIDIA driver"),
        (OLD_DRIVER, "FAIL. .*pip uninstall -y torch, then the command that .* gives for CUDA 11"),
        (BROKEN, "FAIL. .*run nvidia-smi"),
        ({"cards": ["P100"], "capability": (6, 0), "place": "kaggle"}, "FAIL. P100 .sm_60.*choose GPU T4 x2"),
        ({"capability": (6, 1)}, "FAIL. .*sm_61.*pip uninstall -y torch, then the command that .* gives for an older"),
        ({"gpu_free": 3}, "WARN. .*close what uses the card"),
        ({"cards": ["T4", "T4"]}, "OK. +2 cards: this process trains on the first.*accelerate launch.*second trains"),
        ({"trl": None}, "FAIL. trl is missing: run the first cell again"),
        ({"trl": None, "place": "local"}, "FAIL. trl is missing: pip install -r requirements.txt"),
        ({"peft": "0.1.0"}, "WARN. peft 0.1.0 is older than"),
        ({"torchao": "0.10.0"}, "FAIL. .*torchao makes PEFT fail"),
        ({"ram": 2}, "WARN. 2.0 GiB of RAM free: close other programs"),
        ({"disk": 2}, "WARN. 2.0 GiB of disk free"),
        ({"hub": False}, "WARN. the Hugging Face Hub does not answer"),
        ({"token": False}, "OK. +no Hub token; only gated models need one, in Colab's secrets .the key icon"),
        ({"drive": False}, "OK. +Drive is not mounted"),
        ({}, "OK. +telemetry is off .HF_HUB_DISABLE_TELEMETRY."),
    ],
)
def test_each_trouble_has_its_advice(check, state, line):
    out = check(**state)
    assert re.search(rf"^\[{line}", out, re.MULTILINE), out


@pytest.mark.parametrize(
    "capability, built_for, runs",
    [
        ((7, 5), ["sm_75", "sm_80"], True),
        ((8, 6), ["sm_75", "sm_80"], True),
        ((6, 0), ["sm_75", "sm_80"], False),
        ((12, 0), ["sm_80", "sm_90"], False),
        ((12, 0), ["sm_80", "compute_90"], True),
        ((12, 0), ["sm_90", "sm_120"], True),
        ((9, 0), ["sm_80", "sm_90a"], True),
        ((9, 0), [], True),
    ],
)
def test_which_cards_a_torch_build_runs_on(capability, built_for, runs):
    assert setup._runs_on(capability, built_for) is runs


def test_it_looks_at_this_machine_without_an_error_and_never_shows_a_token(monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_plantedplantedplanted")
    setup.check_setup()
    out = capsys.readouterr().out
    assert "hf_planted" not in out and "a Hub token is there" in out
    assert all(line.startswith(("[OK]", "[WARN]", "[FAIL]")) for line in out.splitlines())

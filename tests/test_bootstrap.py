"""The first cell on machines that we do not have: Colab, Kaggle, a laptop; nothing is upgraded, nothing is done twice."""

import subprocess
import sys
import types

import nbformat
import pytest

from helpers import setup as bootstrap
from helpers import setup as runtime


@pytest.fixture
def colab(monkeypatch):
    monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))


@pytest.fixture
def pip(monkeypatch):
    """Everything that pip is asked to do; and a table of what is installed, which starts with all requirements."""
    asked = []
    table = dict(bootstrap.requirements())

    def run(*arguments):
        asked.append(arguments)
        for name in arguments[1:]:
            package, _, wanted = name.partition("==")
            if arguments[0] == "install" and wanted:
                table[package] = bootstrap.numbers(wanted)
            elif arguments[0] == "uninstall":
                table.pop(package, None)

    monkeypatch.setattr(bootstrap, "_pip", run)
    monkeypatch.setattr(bootstrap, "installed", table.get)
    monkeypatch.setattr(bootstrap, "_is_stale", lambda package: False)
    return types.SimpleNamespace(asked=asked, table=table)


def test_where_nothing_is_missing_nothing_happens(pip, capsys):
    bootstrap.install_what_is_missing()
    assert pip.asked == [] and capsys.readouterr().out == ""


def test_colab_gets_only_what_it_lacks_without_dependencies_and_once(pip, colab, capsys):
    for name in ("trl", "bitsandbytes", "gguf"):
        del pip.table[name]
    pip.table["torchao"] = (0, 10, 0)
    bootstrap.install_what_is_missing()
    assert pip.asked == [
        ("uninstall", "--yes", "torchao"),
        ("install", "--no-deps", *[bootstrap.tested(name) for name in ("bitsandbytes", "trl", "gguf")]),
    ]
    assert "PEFT refuses" in capsys.readouterr().out
    bootstrap.install_what_is_missing()
    assert len(pip.asked) == 2


def test_an_older_version_that_a_runtime_ships_is_left_alone(pip, colab):
    pip.table["transformers"] = (4, 0, 0)
    bootstrap.install_what_is_missing()
    assert pip.asked == []


def test_a_laptop_gets_the_tested_versions_with_dependencies(pip):
    del pip.table["trl"]
    bootstrap.install_what_is_missing()
    ((command, flag, constraints, wanted),) = pip.asked
    assert (command, flag, wanted) == ("install", "--constraint", bootstrap.tested("trl")) and constraints.endswith(
        "constraints.txt"
    )


def test_a_machine_without_torch_is_told_where_to_get_it(pip):
    del pip.table["torch"]
    with pytest.raises(RuntimeError, match=r"PyTorch is not installed.*pytorch\.org/get-started"):
        bootstrap.install_what_is_missing()
    assert pip.asked == []


def test_what_was_imported_too_early_needs_one_restart(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "trl", types.SimpleNamespace(__version__="0.1.0"))
    bootstrap.install_what_is_missing()
    assert capsys.readouterr().out.startswith("Restart once: trl was imported before")


def test_a_failing_pip_says_what_it_said():
    with pytest.raises(RuntimeError, match=r"pip install .*failed: ERROR: No matching distribution.*Check the network"):
        bootstrap._pip("install", "--no-index", "this-package-does-not-exist-anywhere==1")


def test_every_requirement_is_pinned_and_the_pin_satisfies_it():
    for name, lowest in bootstrap.requirements().items():
        assert bootstrap.numbers(bootstrap.tested(name).partition("==")[2]) >= lowest, name


def test_the_first_cell_clones_where_there_is_no_kit_and_finds_it_the_next_time(root, tmp_path):
    """As in Colab: an empty folder, and the repository somewhere else. Run twice, and once from inside a subfolder."""
    notebook = nbformat.read(root / "notebooks" / "00_quickstart.ipynb", as_version=4)
    cell = next(cell.source for cell in notebook.cells if cell.cell_type == "code")
    remote = tmp_path / "remote" / "finetune-kit"
    subprocess.run(["git", "clone", "--quiet", str(root), str(remote)], check=True)
    subprocess.run(["git", "-C", str(remote), "tag", "--force", "v1"], check=True)
    line = next(line for line in cell.splitlines() if line.startswith("REPO, TAG"))
    code = (
        cell.replace(line, f'REPO, TAG = {remote.as_uri()!r}, "v1"')
        + "\nprint(ROOT)\nassert 'torch' not in sys.modules"
    )
    start = tmp_path / "content"
    (start / "deep").mkdir(parents=True)
    expected = start / "finetune-kit"
    for folder in (start, start, expected / "notebooks"):
        done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0 and not done.stderr, (
            "the first thing that a reader sees, and not git's advice on tags"
        )
        assert done.stdout.split()[-1] == str(expected)


# ------------------------------------------------------------------------------------------------------ tokens, Drive


def test_kaggles_secret_is_found_and_colabs_errors_mean_no_token(monkeypatch):
    import huggingface_hub

    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    secrets = types.ModuleType("kaggle_secrets")
    secrets.UserSecretsClient = lambda: types.SimpleNamespace(
        get_secret=lambda name: "hf_planted" if name == "HF_TOKEN" else None
    )
    monkeypatch.setitem(sys.modules, "kaggle_secrets", secrets)
    assert runtime.where() == "kaggle" and runtime.find_token()

    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE")
    monkeypatch.delenv("HF_TOKEN")

    def refuses():
        raise TimeoutError("Requesting secret HF_TOKEN timed out.")

    monkeypatch.setattr(huggingface_hub, "get_token", refuses)
    assert runtime.find_token() is False


def test_copies_go_to_drive_only_if_it_is_mounted(monkeypatch, tmp_path):
    monkeypatch.setattr(runtime, "DRIVE", tmp_path / "MyDrive")
    assert runtime.backup_dir() is None
    (tmp_path / "MyDrive").mkdir()
    assert runtime.backup_dir() == tmp_path / "MyDrive" / "finetune-kit" / "runs"

"""The advice for machines that we do not have: each state of card, driver, torch and packages gets its line."""

from dataclasses import replace

import pytest

from helpers.hardware import GIB
from helpers.setup import Facts, _runs_on, check_setup, judge, requirements

VERSIONS = {name: ".".join(map(str, lowest)) for name, lowest in requirements().items()}
T4 = Facts(
    place="colab",
    versions=VERSIONS,
    cards=["Tesla T4"],
    driver_cuda=(13, 0),
    torch_cuda=(12, 8),
    cuda_works=True,
    capability=(7, 5),
    architectures=["sm_75", "sm_80", "sm_90", "compute_90"],
    gpu_free=14 * GIB,
    gpu_total=15 * GIB,
    ram_free=11 * GIB,
    disk_free=70 * GIB,
    hub=True,
    token=True,
    drive=True,
)


def said(facts, status):
    return " | ".join(line.text for line in judge(facts) if line.status == status)


def test_a_free_colab_with_a_t4_is_all_ok():
    assert said(T4, "WARN") == said(T4, "FAIL") == ""
    assert "Tesla T4: 14.0 GiB free of 15.0" in said(T4, "OK") and "Drive is mounted" in said(T4, "OK")


@pytest.mark.parametrize(
    "change, status, words",
    [
        ({"cards": [], "cuda_works": False}, "WARN", "Runtime > Change runtime type > T4 GPU"),
        ({"cards": [], "cuda_works": False, "place": "kaggle"}, "WARN", "Settings > Accelerator"),
        (
            {"cards": [], "cuda_works": False, "place": "local"},
            "WARN",
            "trains the bundled 135M model|train the bundled 135M model",
        ),
        ({"torch_cuda": None, "cuda_works": False}, "FAIL", "torch is a CPU build: pip uninstall -y torch"),
        (
            {"cuda_works": False, "driver_cuda": (11, 4)},
            "FAIL",
            "driver supports CUDA 11.4, torch needs 12.8: update the NVIDIA driver",
        ),
        ({"cuda_works": False}, "FAIL", "run nvidia-smi"),
        (
            {"cards": ["Tesla P100-PCIE-16GB"], "capability": (6, 0), "place": "kaggle"},
            "FAIL",
            "sm_60.*choose GPU T4 x2",
        ),
        (
            {"cards": ["GTX 1080"], "capability": (6, 1), "place": "local"},
            "FAIL",
            "sm_61.*pip uninstall -y torch, then the command for an older",
        ),
        (
            {"torch_cuda": None, "cuda_works": False, "system": "Windows", "place": "local"},
            "FAIL",
            "CPU build.*pytorch.org/get-started/locally",
        ),
        ({"cuda_works": False, "driver_cuda": (11, 4)}, "FAIL", "pip uninstall -y torch, then the command for CUDA 11"),
        ({"gpu_free": 3 * GIB}, "WARN", "close what uses the card"),
        (
            {"cards": ["Tesla T4", "Tesla T4"], "place": "kaggle"},
            "OK",
            "2 cards: this process trains on the first.*accelerate launch.*the second trains another run",
        ),
        ({"python": (3, 9)}, "FAIL", "Python 3.9: 3.10 or newer"),
        ({"versions": VERSIONS | {"trl": None}}, "FAIL", "trl is missing: run the first cell again"),
        (
            {"versions": VERSIONS | {"trl": None}, "place": "local"},
            "FAIL",
            "trl is missing: pip install -r requirements.txt",
        ),
        ({"versions": VERSIONS | {"peft": "0.1.0"}}, "WARN", "peft 0.1.0 is older than"),
        ({"versions": VERSIONS | {"torchao": "0.10.0"}}, "FAIL", "torchao 0.10.0 makes PEFT fail"),
        ({"ram_free": 2 * GIB}, "WARN", "2.0 GiB of RAM free: close other programs"),
        ({"disk_free": 2 * GIB}, "WARN", "2.0 GiB of disk free"),
        ({"hub": False}, "WARN", "Hub does not answer"),
        ({"token": False}, "OK", "no Hub token; only gated models need one, in Colab's secrets .the key icon"),
        ({"drive": False}, "OK", "Drive is not mounted"),
    ],
)
def test_each_trouble_has_its_advice(change, status, words):
    import re

    assert re.search(words, said(replace(T4, **change), status)), judge(replace(T4, **change))


def test_a_torchao_that_peft_accepts_is_no_trouble():
    assert said(replace(T4, versions=VERSIONS | {"torchao": "0.18.0"}), "FAIL") == ""


@pytest.mark.parametrize(
    "capability, built_for, runs",
    [
        ((7, 5), ["sm_75", "sm_80"], True),
        ((8, 6), ["sm_75", "sm_80"], True),
        ((6, 0), ["sm_75", "sm_80"], False),
        ((12, 0), ["sm_80", "sm_90"], False),
        ((12, 0), ["sm_80", "compute_90"], True),
        ((9, 0), ["sm_80", "sm_90a"], True),
        (None, [], True),
    ],
)
def test_which_cards_a_torch_build_runs_on(capability, built_for, runs):
    assert _runs_on(capability, built_for) is runs


def test_it_looks_at_this_machine_without_an_error_and_never_shows_a_token(monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_plantedplantedplanted")
    check_setup()
    out = capsys.readouterr().out
    assert "hf_planted" not in out and "a Hub token is there" in out
    assert all(line.startswith(("[OK]", "[WARN]", "[FAIL]")) for line in out.splitlines())

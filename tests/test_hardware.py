import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from helpers import hardware
from helpers.config import TrainConfig
from helpers.dryrun import Peak
from helpers.hardware import KNOWN_GPUS, Gpu, attention, compute_dtype, detect_gpu, loss_head
from helpers.memory import CUDA_CONTEXT
from helpers.plan import estimate_of, step_of
from helpers.planner import make_plan
from helpers.registry import CATALOG

GIB, MIB = 2**30, 2**20
LLAMA, QWEN = CATALOG["Llama-3.2-1B-Instruct"], CATALOG["Qwen2.5-1.5B-Instruct"]
T4 = KNOWN_GPUS["T4"]


@pytest.mark.parametrize(
    ("dtype", "kernel", "cards"),
    [("float16", "efficient", ("T4", "P100", "RTX 2080 Ti")), ("bfloat16", "flash", ("RTX 3060", "L4", "RTX 5070"))],
)
def test_precision_and_attention_follow_compute_capability(dtype, kernel, cards):
    for card in map(KNOWN_GPUS.get, cards):
        assert (compute_dtype(card)[0], attention(card)[0]) == (dtype, kernel)
        assert card.name in compute_dtype(card)[1] or dtype == "bfloat16"


def test_without_cuda_everything_is_fp32():
    for kind in ("cpu", "mps"):
        assert compute_dtype(Gpu("x", kind, 8 * GIB, 4 * GIB))[0] == "float32"


def test_detection_reports_this_machine():
    gpu = detect_gpu()
    assert 0 < gpu.free_bytes <= gpu.total_bytes and gpu.ram_free_bytes > 0 and "GiB" in str(gpu)


@pytest.fixture
def fake_card(monkeypatch):
    """A CUDA card of 8 GiB in the eyes of torch; the dict says what the driver and PyTorch's allocator report."""
    import torch

    says = {"free": 3 * GIB, "total": 8 * GIB, "reserved": 2 * GIB, "allocated": 0, "flash": True}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (says["free"], says["total"]))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: says["reserved"])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: says["allocated"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Fake")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: says["flash"])
    monkeypatch.setattr(hardware, "_loaded", None)
    return says


def test_detection_counts_what_this_process_holds_in_reserve_as_free(fake_card):
    assert detect_gpu().free_bytes == 5 * GIB
    fake_card["allocated"] = 1 * GIB + hardware.WORKSPACES  # somebody's tensors, which will not be released
    assert detect_gpu().free_bytes == 4 * GIB


def test_the_plan_cell_run_again_with_a_model_loaded_plans_with_the_same_memory(fake_card, monkeypatch):
    """The loaded model is what will be trained, or it makes room for what will be."""
    from types import SimpleNamespace

    import torch

    def on_the_card(mib):
        place = object()
        storage = SimpleNamespace(data_ptr=lambda: id(place), nbytes=lambda: mib * MIB)
        return SimpleNamespace(device=torch.device("cuda"), untyped_storage=lambda: storage, grad=None)

    def planned():
        return make_plan(TrainConfig(), replace(detect_gpu(), capability=(7, 5)), LLAMA, exact=False)

    fake_card |= {"free": 8 * GIB, "reserved": 0}
    before = planned()
    scales = SimpleNamespace(absmax=on_the_card(10), code=on_the_card(1), state2=None, offset=None)
    weight, norm = on_the_card(1000), on_the_card(100)
    weight.quant_state, weight.grad = scales, on_the_card(13)
    model = type("Model", (), {"parameters": lambda self: [weight, norm, norm], "buffers": lambda self: []})()
    hardware.count_as_free(model)
    cublas = 17 * MIB
    fake_card |= {"free": 8 * GIB - 1200 * MIB, "reserved": 1200 * MIB, "allocated": 1124 * MIB + cublas}
    again = planned()
    assert again.gpu.free_bytes == before.gpu.free_bytes and str(again) == str(before)
    del model  # gone: what it held is somebody else's now
    assert detect_gpu().free_bytes == 8 * GIB - (1141 * MIB - hardware.WORKSPACES)


def test_a_model_in_ram_is_counted_as_free_too(monkeypatch):
    import torch

    model = torch.nn.Linear(2**11, 2**11, bias=False)  # 16 MiB
    monkeypatch.setattr(hardware, "_loaded", None)
    hardware.count_as_free(model)
    assert hardware._bytes_of_loaded("cpu") == 16 * MIB and hardware._bytes_of_loaded("cuda") == 0


@pytest.mark.parametrize("variable", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_a_detected_card_says_how_its_allocator_works(fake_card, monkeypatch, variable):
    """The plan must count with the segments that will be used."""
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    assert not detect_gpu().expandable
    monkeypatch.setenv(variable, "garbage_collection_threshold:0.8,expandable_segments:True")
    assert detect_gpu().expandable


def test_segments_that_grow_are_for_linux_that_is_not_inside_windows():
    """Some drivers under WSL fail at it (pytorch#192330)."""
    assert hardware.growing_segments("linux", "6.1.0-13-cloud-amd64") and not hardware.growing_segments("win32", "11")
    assert not hardware.growing_segments("linux", "5.15.153.1-microsoft-standard-WSL2")


@pytest.mark.parametrize(
    "release, wanted", [("5.15.153.1-microsoft-standard-WSL2", "None"), ("6.6.113+", "expandable_segments:True")]
)
def test_importing_the_package_asks_for_them_only_there(root, release, wanted):
    code = f"import os, platform\nplatform.release = lambda: {release!r}\nimport helpers\nprint(os.environ.get('PYTORCH_ALLOC_CONF'))"
    clean = {name: value for name, value in os.environ.items() if name != "PYTORCH_ALLOC_CONF"}
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=clean, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == (wanted if sys.platform == "linux" else "None")


def test_without_flash_attention_keys_are_repeated(fake_card):
    """PyTorch's wheels for Windows have no flash attention, and the math kernel would need twice the memory."""
    assert attention(detect_gpu())[0] == "flash"
    fake_card["flash"] = False
    kernel, reason = attention(detect_gpu())
    assert kernel == "efficient" and "Windows" in reason
    on_windows = replace(KNOWN_GPUS["RTX 3060"], flash=False, expandable=False)
    config = TrainConfig(max_length=2048, micro_batch_size=1)
    plans = [make_plan(config, card, QWEN, exact=False) for card in (on_windows, KNOWN_GPUS["RTX 3060"])]
    assert plans[0].peak_bytes > plans[1].peak_bytes
    assert [step_of(config, plan, QWEN.shape).attention for plan in plans] == ["efficient", "flash"]


def test_the_context_of_the_driver_is_counted_once(fake_card):
    """Asking the driver for the free memory makes the context, so what it says has left the context out."""
    assert detect_gpu().has_context and not T4.has_context
    cards = [replace(T4, has_context=known) for known in (False, True)]
    ahead, here = (make_plan(TrainConfig(), card, LLAMA, exact=False) for card in cards)
    assert ahead.peak_bytes - here.peak_bytes == CUDA_CONTEXT
    measured = Peak(allocated=GIB, reserved=GIB, live_peak=GIB, resident=1, flops=1, bytes_moved=1)
    assert [replace(plan, measured=measured, largest_bytes=0).peak_bytes for plan in (ahead, here)] == [
        GIB + CUDA_CONTEXT,
        GIB,
    ]


@pytest.mark.parametrize(
    "name, capability, alike",
    [
        ("Tesla T4", (7, 5), "T4"),
        ("Tesla P100-PCIE-16GB", (6, 0), "P100"),
        ("Tesla P100-SXM2-16GB", (6, 0), "P100"),
        ("NVIDIA A100-SXM4-40GB", (8, 0), "A100"),
        ("NVIDIA A100-PCIE-40GB", (8, 0), "A100"),
        ("NVIDIA A100 80GB PCIe", (8, 0), "A100"),
        ("NVIDIA GeForce RTX 4060 Laptop GPU", (8, 9), "RTX 4060"),
        ("NVIDIA GeForce RTX 4060 Ti", (8, 9), "RTX 4060 Ti 16GB"),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", (8, 9), "RTX 4070 Ti SUPER"),
        ("NVIDIA GeForce RTX 3080 Ti", (8, 6), "RTX 3080 10GB"),
        ("NVIDIA L4", (8, 9), "L4"),
        ("NVIDIA L40S", (8, 9), ""),
        ("NVIDIA GeForce RTX 4060", (7, 5), ""),
        ("NVIDIA H100 80GB HBM3", (9, 0), ""),
    ],
)
def test_a_cards_speed_is_found_by_how_its_real_name_begins(name, capability, alike):
    """Names as drivers report them."""
    found = hardware.speed(Gpu(name, "cuda", GIB, GIB, capability))
    assert bool(found.source) == bool(alike)
    if alike:
        assert (found.teraflops, found.gigabytes_per_second) == hardware.DATA_SHEETS[alike]


def test_every_data_sheet_is_of_a_card_that_it_is_found_for():
    for short, sheet in hardware.DATA_SHEETS.items():
        found = hardware.speed(KNOWN_GPUS[short])
        assert (found.teraflops, found.gigabytes_per_second) == sheet, short
    assert hardware.speed(T4).source == "fitted on recorded T4 steps"


def test_planning_needs_no_torch(root):
    """Planning by formula is instant on any machine."""
    code = (
        "import sys, helpers.menu, helpers.planner as p, helpers.hardware as h, helpers.config as c;"
        "p.make_plan(c.TrainConfig(), h.KNOWN_GPUS['T4'], 'Qwen/Qwen2.5-7B-Instruct', exact=False);"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text", "gemma4", "qwen3_5"])
def test_a_family_that_overflows_fp16_gets_fp32_where_bf16_is_missing(model_type):
    dtype, reason = compute_dtype(T4, model_type)
    assert dtype == "float32" and model_type in reason
    assert compute_dtype(KNOWN_GPUS["RTX 3060"], model_type)[0] == "bfloat16"
    assert {compute_dtype(T4, other)[0] for other in ("llama", "qwen2", "qwen3", "")} == {"float16"}


@pytest.mark.parametrize("model_type", ["gemma3_text", "qwen3_5_text"])
def test_that_is_decided_by_the_type_in_config_json_even_where_memory_is_not_modeled(tmp_path, monkeypatch, model_type):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    monkeypatch.setattr("helpers.planner.find_shape", lambda model: None)
    plan = make_plan(TrainConfig(), T4, str(tmp_path))
    assert plan.memory is None and plan.dtype == "float32"


def test_numbers_of_a_model_in_fp32_are_counted_with_four_bytes():
    """Gemma on a T4 calculates in fp32."""
    row = CATALOG["gemma-2-2b-it"]
    plan = make_plan(TrainConfig(micro_batch_size=1, gradient_checkpointing="off"), KNOWN_GPUS["T4"], row, exact=False)
    halved = estimate_of(TrainConfig(), replace(plan, dtype="float16"), row.shape)
    sizes = [memory.parts["embeddings and norms"] for memory in (plan.memory, halved)]
    assert plan.dtype == "float32" and sizes[0] == 2 * sizes[1] == 4 * row.shape.other_parameters()


def test_the_loss_head_is_what_was_tried_and_planned_for_the_worse_until_then(monkeypatch):
    """Triton works on some T4s and is promised on none, so the probe decides and the plan waits for it."""
    monkeypatch.setattr(hardware, "_torch_without_triton", lambda: False)
    rtx = KNOWN_GPUS["RTX 3060"]
    assert loss_head(T4)[0] == "torch" and "training tries it" in loss_head(T4)[1]
    assert loss_head(rtx)[0] == "triton"
    for card in (T4, rtx):
        for found in ("triton", "torch", "full"):
            assert loss_head(replace(card, fused_head=found))[0] == found
    assert "failed a test on this card" in loss_head(replace(rtx, fused_head="torch"))[1]

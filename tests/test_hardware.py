import sys
from dataclasses import replace

import pytest

from helpers.catalog import CATALOG
from helpers.hardware import KNOWN_GPUS, Gpu, attention, compute_dtype, detect_gpu, loss_head


@pytest.mark.parametrize(
    ("card", "dtype", "kernel"),
    [("T4", "float16", "efficient"), ("P100", "float16", "efficient"), ("RTX 2080 Ti", "float16", "efficient"),
     ("RTX 3060", "bfloat16", "flash"), ("L4", "bfloat16", "flash"), ("RTX 5070", "bfloat16", "flash")],
)  # fmt: skip
def test_precision_and_attention_follow_compute_capability(card, dtype, kernel):
    assert compute_dtype(KNOWN_GPUS[card])[0] == dtype
    assert attention(KNOWN_GPUS[card])[0] == kernel


def test_a_t4_says_why_it_is_not_bf16():
    assert "Tesla T4" in compute_dtype(KNOWN_GPUS["T4"])[1]


@pytest.mark.parametrize("kind", ["cpu", "mps"])
def test_without_cuda_everything_is_fp32(kind):
    assert compute_dtype(Gpu("x", kind, 8 * 2**30, 4 * 2**30))[0] == "float32"


def test_detection_reports_this_machine():
    gpu = detect_gpu()
    assert 0 < gpu.free_bytes <= gpu.total_bytes
    assert gpu.ram_free_bytes > 0
    assert "GiB" in str(gpu)


def test_detection_counts_what_this_process_holds_in_reserve_as_free(monkeypatch):
    import torch

    gib = 2**30
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * gib, 8 * gib))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2 * gib)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1 * gib)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Fake")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert detect_gpu().free_bytes == 4 * gib


def test_planning_needs_no_torch(root):
    """hardware, config, catalog, memory and planner import no torch, so that planning is instant on any machine."""
    import subprocess

    code = ("import sys, helpers.planner as p, helpers.hardware as h, helpers.config as c;"
            "p.make_plan(c.TrainConfig(), h.KNOWN_GPUS['T4'], 'Qwen/Qwen2.5-7B-Instruct', exact=False);"
            "sys.exit('torch' in sys.modules)")  # fmt: skip
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0


@pytest.mark.parametrize("family, card, expected", [("gemma2", "T4", "float32"), ("gemma3_text", "T4", "float32"),
                                                    ("gemma2", "RTX 3060", "bfloat16"), ("llama", "T4", "float16"),
                                                    ("qwen2", "RTX 2070", "float16")])  # fmt: skip
def test_a_family_that_overflows_fp16_gets_fp32_where_bf16_is_missing(family, card, expected):
    shape = replace(CATALOG["Llama-3.2-1B-Instruct"].shape, model_type=family)
    dtype, reason = compute_dtype(KNOWN_GPUS[card], shape)
    assert dtype == expected and (family in reason) == (expected == "float32")


def test_a_card_whose_triton_failed_gets_the_torch_loss_head():
    card = replace(KNOWN_GPUS["RTX 3060"], triton=False)
    head, reason = loss_head(card)
    assert head == "torch" and "failed a test on this card" in reason

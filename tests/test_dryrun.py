"""The dry run against the same step done for real on the CPU, and what it must leave alone."""

import os
import subprocess
import sys

import pytest

from benchmarks.memory_rows import step_from_row
from helpers.dryrun import DryRunError, Step, dry_run

LLAMA = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 4096,
    "tie_word_embeddings": False,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
}
QWEN2 = LLAMA | {"model_type": "qwen2"}  # biases on q, k, v
QWEN3 = LLAMA | {"model_type": "qwen3", "head_dim": 64}  # norms on q and k
TIED = LLAMA | {"tie_word_embeddings": True, "vocab_size": 40000}  # two tiles of the loss head
COMMON = {
    "micro_batch": 2,
    "seq_len": 96,
    "dtype": "float32",
    "attention": "math",
    "loss_head": "torch",
    "autocast": False,
    "optimizer": "adamw_torch",
    "r": 8,
}
SETTINGS = {
    "gqa, nf4, checkpointing": Step(LLAMA, **COMMON),
    "no checkpointing": Step(LLAMA, **COMMON | {"checkpointing": "off"}),
    "reentrant checkpointing": Step(LLAMA, **COMMON | {"checkpointing": "reentrant"}),
    "selective checkpointing": Step(LLAMA, **COMMON | {"checkpointing": "selective"}),
    "16-bit weights": Step(LLAMA, **COMMON | {"quantization": "none"}),
    "no double quantization": Step(LLAMA, **COMMON | {"double_quant": False}),
    "biases": Step(QWEN2, **COMMON),
    "query and key norms": Step(QWEN3, **COMMON | {"checkpointing": "off"}),
    "tied embeddings, two tiles": Step(TIED, **COMMON | {"micro_batch": 1}),
    "full logits": Step(TIED, **COMMON | {"micro_batch": 1, "loss_head": "full", "checkpointing": "off"}),
    "eager attention, bf16": Step(
        LLAMA, **COMMON | {"attention": "eager", "dtype": "bfloat16", "adapter_dtype": "bfloat16"}
    ),
    "rank 64 on two layers": Step(LLAMA, **COMMON | {"r": 64, "target_modules": ["q_proj", "v_proj"]}),
}
# As a real batch is: shorter examples are padded, so there is a mask, no "is causal", and keys are repeated for every head.
PADDED = {
    f"padded, {name}": Step(model, **COMMON | {"masked": True} | changes)
    for name, model, changes in [
        ("checkpointing", LLAMA, {}),
        ("no checkpointing", LLAMA, {"checkpointing": "off"}),
        ("selective checkpointing", LLAMA, {"checkpointing": "selective"}),
        ("four at a time", LLAMA, {"micro_batch": 4, "checkpointing": "off"}),
        ("longer", LLAMA, {"seq_len": 320}),
        ("a length that is no multiple of eight", LLAMA, {"seq_len": 93, "checkpointing": "off"}),
        ("biases", QWEN2, {"checkpointing": "off"}),
        ("query and key norms", QWEN3, {}),
        ("16-bit weights", LLAMA, {"quantization": "none"}),
        ("eager attention", LLAMA, {"attention": "eager", "checkpointing": "off"}),
    ]
}
SETTINGS |= PADDED
EVERY_DAY = ("padded, no checkpointing", "gqa, nf4, checkpointing", "no checkpointing", "tied embeddings, two tiles")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in EVERY_DAY else [pytest.mark.slow]) for name in SETTINGS]
)
def test_the_peak_without_weights_equals_the_peak_of_the_real_step(name):
    from dataclasses import replace

    step = SETTINGS[name]
    planned, real = dry_run(step), dry_run(replace(step, device="cpu"))
    assert planned.resident == real.resident
    assert planned.live_peak == pytest.approx(real.live_peak, rel=1e-3)
    assert planned.flops >= real.flops > 0


@pytest.mark.parametrize("attention, checkpointing", [("flash", "off"), ("efficient", "off"), ("flash", "on")])
def test_a_padded_batch_needs_its_mask_and_repeated_keys(attention, checkpointing):
    """Where the mask is left out, as transformers leaves it out when nothing is padded, all this would be missing from the plan."""
    from dataclasses import replace

    step = Step(LLAMA, 2, 512, attention=attention, checkpointing=checkpointing)
    grown = dry_run(replace(step, masked=True)).live_peak - dry_run(step).live_peak
    pairs, tokens, layers = 2 * 512**2, 2 * 512, LLAMA["num_hidden_layers"]
    if checkpointing == "on":  # at the peak, when the loss is computed, a byte for each pair of tokens is kept
        wanted = pairs
    else:  # each layer keeps a bias of two bytes for each pair; flash attention would have kept two heads' keys and values, not four's
        wanted = layers * (2 * pairs + (2 * tokens * 2 * 64 * 2 if attention == "flash" else 0))
    assert grown == pytest.approx(wanted, rel=0.02)


def test_segments_are_counted_as_they_will_be_used():
    from dataclasses import replace

    step = Step(
        LLAMA | {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "head_dim": 64},
        3,
        700,
        checkpointing="off",
    )
    fixed, growing = dry_run(step), dry_run(replace(step, expandable=True))
    assert fixed.live_peak == growing.live_peak and growing.allocated <= growing.reserved < fixed.reserved


def test_a_step_in_fp32_has_no_autocast():
    """It would cast, and keep, each weight that is unpacked from four bits: twice the memory of the real step."""
    from helpers.config import TrainConfig
    from helpers.hardware import KNOWN_GPUS
    from helpers.plan import step_of
    from helpers.planner import make_plan
    from helpers.registry import CATALOG

    row = CATALOG["gemma-2-2b-it"]
    plan = make_plan(TrainConfig(), KNOWN_GPUS["T4"], row, exact=False)
    assert plan.dtype == "float32" and not step_of(TrainConfig(), plan, row.shape).autocast
    llama = make_plan(TrainConfig(), KNOWN_GPUS["T4"], CATALOG["Llama-3.2-1B-Instruct"], exact=False)
    assert step_of(TrainConfig(), llama, CATALOG["Llama-3.2-1B-Instruct"].shape).autocast


def test_attentions_work_is_what_torch_counts_and_does_not_depend_on_shared_keys():
    """torch 2.11's own counter stops at grouped-query attention, and with it every plan for a card with flash attention stopped."""
    import bitsandbytes  # noqa: F401  its operations are looked at
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from helpers.dryrun.tracker import MemoryTracker

    aten = torch.ops.aten
    query, key = (
        torch.empty(2, heads, 96, 64, device="meta", dtype=torch.bfloat16, requires_grad=True) for heads in (8, 8)
    )
    for kernel in ("flash", "efficient"):

        def attend(query, key, kernel=kernel):
            if kernel == "flash":
                return aten._scaled_dot_product_flash_attention(query, key, key, 0.0, True)[0]
            return aten._scaled_dot_product_efficient_attention(query, key, key, None, True, 0.0, True)[0]

        with FlopCounterMode(display=False) as torchs:
            attend(query, key).sum().backward()
        with MemoryTracker() as ours:
            attend(query, key).sum().backward()
        assert ours.flops == torchs.get_total_flops() == 7 * 2 * 2 * 8 * 96 * 96 * 64
    with MemoryTracker() as shared:
        attend_shared = aten._scaled_dot_product_flash_attention(query, key[:, :2], key[:, :2], 0.0, True)[0]
        attend_shared.sum().backward()
    assert shared.flops == ours.flops


def test_the_dry_runs_process_sees_no_card():
    """Importing bitsandbytes asks CUDA, which would take a context of a few hundred MiB on the card that is to be trained on."""
    from pathlib import Path

    from helpers import dryrun

    dry_run(Step(LLAMA, 1, 64))
    if sys.platform == "linux":
        environment = Path(f"/proc/{dryrun._worker._process.pid}/environ").read_bytes().split(b"\0")
        assert b"CUDA_VISIBLE_DEVICES=" in environment


def test_a_worker_whose_trl_lacks_a_name_says_which(monkeypatch):
    """`missing_names` is the first thing that the process says; a step with TRL's head is then refused."""
    import torch

    from helpers.dryrun import worker as dryrun_worker

    monkeypatch.setattr(
        torch, "is_autocast_enabled", torch.is_autocast_enabled
    )  # the worker replaces it, and this is not its process
    assert dryrun_worker.missing_names() == []
    monkeypatch.setattr(dryrun_worker, "missing_names", lambda: ["trl.gone"])
    with pytest.raises(RuntimeError, match=r"TRL has no trl\.gone"):
        dryrun_worker.choose_loss_head(Step(LLAMA, 1, 64), dryrun_worker.MemoryTracker())


def test_more_tokens_more_memory_less_checkpointing_more_memory():
    from dataclasses import replace

    step = Step(LLAMA, 1, 512)
    assert dry_run(replace(step, micro_batch=2)).allocated > dry_run(step).allocated
    off, selective, on = (dry_run(replace(step, checkpointing=mode)).allocated for mode in ("off", "selective", "on"))
    assert off > selective > on
    offloaded = dry_run(replace(step, offload=True, seq_len=1024, checkpointing="off"))
    assert (
        offloaded.allocated < dry_run(replace(step, seq_len=1024, checkpointing="off")).allocated and offloaded.host > 0
    )


def test_a_small_tile_helps_where_there_is_no_triton():
    from dataclasses import replace

    step = Step(TIED | {"vocab_size": 128256}, 2, 1024, loss_head="torch")
    large, small, triton = (
        dry_run(step),
        dry_run(replace(step, loss_tile=4096)),
        dry_run(replace(step, loss_head="triton")),
    )
    assert large.allocated > 1.5 * small.allocated
    assert triton.allocated < large.allocated


@pytest.mark.parametrize("phase", ["evaluate", "generate"])
def test_evaluation_and_generation_can_be_measured_too(phase):
    from dataclasses import replace

    step = Step(LLAMA, 1, 512)
    assert 0 < dry_run(replace(step, phase=phase)).allocated < dry_run(replace(step, checkpointing="off")).allocated


def test_a_model_that_cannot_be_built_is_said_and_the_worker_lives_on():
    with pytest.raises(DryRunError, match=r"t5|T5"):
        dry_run(Step({"model_type": "t5"}, 1, 64))
    assert dry_run(Step(LLAMA, 1, 64)).allocated > 0


def test_the_callers_process_stays_clean():
    """After a dry run, nothing is patched here and a real quantization still works."""
    import bitsandbytes as bnb
    import torch
    import trl.kernels.chunked_logprob as trl_kernels

    before = (
        torch.nn.functional.linear,
        torch.nn.functional.softmax,
        torch.is_autocast_enabled,
        trl_kernels._forward_tile,
    )
    dry_run(Step(LLAMA, 1, 64))
    assert before == (
        torch.nn.functional.linear,
        torch.nn.functional.softmax,
        torch.is_autocast_enabled,
        trl_kernels._forward_tile,
    )
    weight = torch.randn(128, 128)
    packed, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    assert (bnb.functional.dequantize_4bit(packed, state) - weight).abs().mean() < 0.15


@pytest.mark.slow
def test_the_command_checks_a_card_from_a_csv_file(root, tmp_path):
    header, first = (root / "benchmarks/data/t4_measured.csv").read_text().splitlines()[0], None
    rows = (root / "benchmarks/data/t4_measured.csv").read_text().splitlines()[1:]
    first = next(row for row in rows if row.startswith("SmolLM2-135M"))
    (tmp_path / "mine.csv").write_text(f"{header}\n{first}\n")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory_rows", str(tmp_path / "mine.csv")],
        cwd=root,
        capture_output=True,
        text=True,
        env=os.environ,
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and lines[0] == f"{header},predicted_allocated_mib,predicted_reserved_mib"
    assert lines[1].startswith(first) and len(lines) == 4
    assert (
        lines[2].startswith("allocated: mean ") and lines[3].startswith("reserved: mean ") and " %, worst " in lines[3]
    )


@pytest.mark.parametrize(
    ("content", "message"), [(None, "no file at"), ("model,base_weights\nx,nf4\n", "line 2"), ("model\n", "no rows")]
)
def test_a_csv_file_that_cannot_be_used_gets_one_sentence(root, tmp_path, content, message):
    file = tmp_path / "mine.csv"
    if content is not None:
        file.write_text(content)
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory_rows", str(file)], cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 2 and message in done.stderr.splitlines()[-1]


def test_rows_without_the_extra_columns_mean_the_recorded_recipe():
    row = {
        "model": "Qwen2.5-1.5B-Instruct",
        "hidden_size": "1",
        "intermediate_size": "1",
        "num_hidden_layers": "1",
        "num_attention_heads": "1",
        "num_key_value_heads": "1",
        "head_dim": "1",
        "vocab_size": "1",
        "tie_word_embeddings": "True",
        "base_weights": "nf4",
        "double_quant": "False",
        "compute_dtype": "float16",
        "attention": "sdpa-efficient",
        "gradient_checkpointing": "True",
        "optimizer": "adamw_torch_fp32",
        "lora_rank": "32",
        "lora_targets": "q_proj+k_proj",
        "batch_size": "2",
        "seq_len": "1024",
    }
    step = step_from_row(row)
    assert (step.model["model_type"], step.loss_head, step.fp32_upcast, step.adapter_dtype) == (
        "qwen2",
        "full",
        True,
        "float32",
    )
    other = step_from_row(
        row | {"model_type": "llama", "loss_head": "triton", "fp32_upcast": "False", "adapter_dtype": "bfloat16"}
    )
    assert (other.model["model_type"], other.loss_head, other.fp32_upcast, other.adapter_dtype) == (
        "llama",
        "triton",
        False,
        "bfloat16",
    )

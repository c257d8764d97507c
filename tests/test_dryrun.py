"""The dry run against the same step done for real on the CPU, and what it must leave alone."""

import csv
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.memory_rows import step_from_row
from helpers import dryrun
from helpers.dryrun import DryRunError, Peak, Step, measure, measure_once, missing_names
from helpers.dryrun.tracker import MemoryTracker

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
REAL = {"dtype": "float32", "attention": "math", "loss_head": "torch", "autocast": False, "optimizer": "adamw_torch"}
OFF, EAGER, BF16 = {"checkpointing": "off"}, {"attention": "eager"}, {"dtype": "bfloat16", "adapter_dtype": "bfloat16"}
SETTINGS = {
    "gqa, nf4, checkpointing": (LLAMA, {}),
    "no checkpointing": (LLAMA, OFF),
    "reentrant checkpointing": (LLAMA, {"checkpointing": "reentrant"}),
    "selective checkpointing": (LLAMA, {"checkpointing": "selective"}),
    "16-bit weights": (LLAMA, {"quantization": "none"}),
    "no double quantization": (LLAMA, {"double_quant": False}),
    "biases": (QWEN2, {}),
    "query and key norms": (QWEN3, OFF),
    "tied embeddings, two tiles": (TIED, {"micro_batch": 1}),
    "full logits": (TIED, {"micro_batch": 1, "loss_head": "full"} | OFF),
    "eager attention, bf16": (LLAMA, EAGER | BF16),
    "rank 64 on two layers": (LLAMA, {"r": 64, "target_modules": ["q_proj", "v_proj"]}),
}
# As a real batch is: shorter examples are padded, so there is a mask, no "is causal", and keys are repeated for every head.
PADDED = {
    "checkpointing": (LLAMA, {}),
    "no checkpointing": (LLAMA, OFF),
    "selective checkpointing": (LLAMA, {"checkpointing": "selective"}),
    "four at a time": (LLAMA, {"micro_batch": 4} | OFF),
    "longer": (LLAMA, {"seq_len": 320}),
    "a length that is no multiple of eight": (LLAMA, {"seq_len": 93} | OFF),
    "biases": (QWEN2, OFF),
    "query and key norms": (QWEN3, {}),
    "16-bit weights": (LLAMA, {"quantization": "none"}),
    "eager attention": (LLAMA, EAGER | OFF),
}
SETTINGS |= {f"padded, {name}": (model, changes | {"masked": True}) for name, (model, changes) in PADDED.items()}
SETTINGS = {
    name: Step(model, **{"micro_batch": 2, "seq_len": 96, "r": 8} | REAL | changes)
    for name, (model, changes) in SETTINGS.items()
}
EVERY_DAY = ("padded, no checkpointing", "tied embeddings, two tiles")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in EVERY_DAY else [pytest.mark.slow]) for name in SETTINGS]
)
def test_the_peak_without_weights_equals_the_peak_of_the_real_step(name):
    step = SETTINGS[name]
    planned, real = measure(step), measure(replace(step, device="cpu"))
    assert planned.resident == real.resident
    assert planned.live_peak == pytest.approx(real.live_peak, rel=1e-3)
    assert planned.flops >= real.flops > 0


@pytest.mark.parametrize("attention, checkpointing", [("flash", "off"), ("efficient", "off"), ("flash", "on")])
def test_a_padded_batch_needs_its_mask_and_repeated_keys(attention, checkpointing):
    """Where the mask is left out, as transformers leaves it out when nothing is padded, all this would be missing from the plan."""
    step = Step(LLAMA, 2, 512, attention=attention, checkpointing=checkpointing)
    grown = measure(replace(step, masked=True)).live_peak - measure(step).live_peak
    pairs, tokens, layers = 2 * 512**2, 2 * 512, LLAMA["num_hidden_layers"]
    if checkpointing == "on":  # at the peak, when the loss is computed, a byte for each pair of tokens is kept
        wanted = pairs
    else:  # each layer keeps a bias of two bytes for each pair; flash attention would have kept two heads' keys and values, not four's
        wanted = layers * (2 * pairs + (2 * tokens * 2 * 64 * 2 if attention == "flash" else 0))
    assert grown == pytest.approx(wanted, rel=0.02)


def test_segments_are_counted_as_they_will_be_used():
    wide = LLAMA | {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "head_dim": 64}
    step = Step(wide, 3, 700, checkpointing="off")
    fixed, growing = measure(step), measure(replace(step, expandable=True))
    assert fixed.live_peak == growing.live_peak and growing.allocated <= growing.reserved < fixed.reserved


def test_a_step_in_fp32_has_no_autocast():
    """It would cast, and keep, each weight that is unpacked from four bits: twice the memory of the real step."""
    from helpers.config import TrainConfig
    from helpers.hardware import KNOWN_GPUS
    from helpers.plan import step_of
    from helpers.planner import make_plan
    from helpers.registry import CATALOG

    for name, dtype in (("gemma-2-2b-it", "float32"), ("Llama-3.2-1B-Instruct", "float16")):
        plan = make_plan(TrainConfig(), KNOWN_GPUS["T4"], CATALOG[name], exact=False)
        assert plan.dtype == dtype
        assert step_of(TrainConfig(), plan, CATALOG[name].shape).autocast == (dtype == "float16")


def test_attentions_work_is_what_torch_counts_and_does_not_depend_on_shared_keys():
    """torch 2.11's own counter stops at grouped-query attention, and with it every plan for a card with flash attention stopped."""
    aten = torch.ops.aten
    query, key = (torch.empty(2, 8, 96, 64, device="meta", dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    kernels = (
        lambda query, key: aten._scaled_dot_product_flash_attention(query, key, key, 0.0, True)[0],
        lambda query, key: aten._scaled_dot_product_efficient_attention(query, key, key, None, True, 0.0, True)[0],
    )
    for attend in kernels:
        with FlopCounterMode(display=False) as torchs:
            attend(query, key).sum().backward()
        with MemoryTracker() as ours:
            attend(query, key).sum().backward()
        assert ours.flops == torchs.get_total_flops() == 7 * 2 * 2 * 8 * 96 * 96 * 64
    with MemoryTracker() as shared:
        kernels[0](query, key[:, :2]).sum().backward()
    assert shared.flops == ours.flops


def test_the_dry_runs_process_sees_no_card():
    """Importing bitsandbytes asks CUDA, which would take a context of a few hundred MiB on the card that is to be trained on."""
    measure(Step(LLAMA, 1, 64))
    if sys.platform == "linux":
        environment = Path(f"/proc/{dryrun._worker._process.pid}/environ").read_bytes().split(b"\0")
        assert b"CUDA_VISIBLE_DEVICES=" in environment


def test_a_worker_whose_trl_lacks_a_name_says_which(monkeypatch):
    """The process is asked before a plan is made; a step with TRL's head is refused."""
    from helpers.dryrun import patches

    monkeypatch.setattr("torch.is_autocast_enabled", torch.is_autocast_enabled)  # it is replaced, and this is no worker
    assert missing_names() == patches.missing_names() == []
    monkeypatch.setattr(patches, "missing_names", lambda: ["trl.gone"])
    with pytest.raises(RuntimeError, match=r"TRL has no trl\.gone"):
        patches.choose_loss_head(Step(LLAMA, 1, 64), MemoryTracker())


def test_more_tokens_more_memory_less_checkpointing_more_memory():
    step = Step(LLAMA, 1, 512)
    assert measure(replace(step, micro_batch=2)).allocated > measure(step).allocated
    off, selective, on = (measure(replace(step, checkpointing=mode)).allocated for mode in ("off", "selective", "on"))
    assert off > selective > on
    longer = replace(step, seq_len=1024, checkpointing="off")
    assert measure(replace(longer, offload=True)).allocated < measure(longer).allocated


def test_gradients_of_earlier_micro_batches_are_counted():
    """They are there while the forward pass of the next one saves its activations."""
    step = Step(LLAMA, 1, 512, checkpointing="off", r=64)
    first, later = (measure(replace(step, accumulating=accumulating)).live_peak for accumulating in (False, True))
    per_layer = {"q": 256 + 256, "k": 256 + 128, "v": 256 + 128, "o": 256 + 256, "mlp": 3 * (256 + 704)}
    assert later - first == pytest.approx(4 * 4 * 64 * sum(per_layer.values()), rel=0.1)


def test_evaluation_finds_the_optimizers_state_on_the_card():
    step = Step(LLAMA, 1, 512, phase="evaluate", r=64)
    small, large = (measure(replace(step, optimizer=optimizer)).resident for optimizer in ("adamw_8bit", "adamw_torch"))
    assert large > small > measure(replace(step, phase="generate")).resident


def test_what_was_measured_is_not_measured_again(monkeypatch, tmp_path):
    """Until a library has another version. A file that is not whole is no answer."""
    asked = []
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr(dryrun, "measure", lambda step: asked.append(step) or Peak(1, 2, 3, 4, 5, 6))
    step = Step(LLAMA, 1, 64)
    for other in (step, step, replace(step, seq_len=65)):
        assert measure_once(other) == Peak(1, 2, 3, 4, 5, 6)
    assert len(asked) == 2
    for file in tmp_path.rglob("*.json"):
        file.write_text('{"allocated": 1')
    measure_once(step)
    monkeypatch.setattr(dryrun, "version", lambda name: "another")
    for _ in range(2):
        measure_once(step)
    assert len(asked) == 4


def test_a_small_tile_helps_where_there_is_no_triton():
    step = Step(TIED | {"vocab_size": 128256}, 2, 1024, loss_head="torch")
    large, small, triton = (
        measure(replace(step, **how)).allocated for how in ({}, {"loss_tile": 4096}, {"loss_head": "triton"})
    )
    assert large > 1.5 * small and triton < large


@pytest.mark.parametrize("phase", ["evaluate", "generate"])
def test_evaluation_and_generation_can_be_measured_too(phase):
    step = Step(LLAMA, 1, 512)
    assert 0 < measure(replace(step, phase=phase)).allocated < measure(replace(step, checkpointing="off")).allocated


def test_a_model_that_cannot_be_built_is_said_and_the_worker_lives_on():
    with pytest.raises(DryRunError, match=r"t5|T5"):
        measure(Step({"model_type": "t5"}, 1, 64))
    assert measure(Step(LLAMA, 1, 64)).allocated > 0


def test_the_callers_process_stays_clean():
    """After a dry run, nothing is patched here and a real quantization still works."""
    from helpers.dryrun import patches

    measure(Step(LLAMA, 1, 64))
    assert len(patches.ORIGINALS) == 10
    assert all(getattr(module, name) is original for module, name, original in patches.ORIGINALS)
    assert torch.nn.functional.linear.__module__ != "helpers.dryrun.patches" != torch.is_autocast_enabled.__module__
    weight = torch.randn(128, 128)
    packed, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    assert (bnb.functional.dequantize_4bit(packed, state) - weight).abs().mean() < 0.15


def check_rows(root, file):
    command = [sys.executable, "-m", "benchmarks.memory_rows", str(file)]
    return subprocess.run(command, cwd=root, capture_output=True, text=True)


@pytest.mark.slow
def test_the_command_checks_a_card_from_a_csv_file(root, tmp_path):
    header, *rows = (root / "benchmarks/data/t4_measured.csv").read_text().splitlines()
    first = next(row for row in rows if row.startswith("SmolLM2-135M"))
    (tmp_path / "mine.csv").write_text(f"{header}\n{first}\n")
    done = check_rows(root, tmp_path / "mine.csv")
    head, row, *errors = done.stdout.splitlines()
    assert done.returncode == 0 and head == f"{header},predicted_allocated_mib,predicted_reserved_mib"
    assert row.startswith(first) and [line.split(" mean ")[0] for line in errors] == ["allocated:", "reserved:"]
    assert all(" %, worst " in line for line in errors)


@pytest.mark.parametrize(
    ("content", "message"), [(None, "no file at"), ("model,base_weights\nx,nf4\n", "line 2"), ("model\n", "no rows")]
)
def test_a_csv_file_that_cannot_be_used_gets_one_sentence(root, tmp_path, content, message):
    if content is not None:
        (tmp_path / "mine.csv").write_text(content)
    done = check_rows(root, tmp_path / "mine.csv")
    assert done.returncode == 2 and message in done.stderr.splitlines()[-1]


def test_rows_without_the_extra_columns_mean_the_recorded_recipe(root):
    with (root / "benchmarks/data/t4_measured.csv").open() as file:
        row = next(csv.DictReader(file))
    recorded = step_from_row(row)
    told = {"model_type": "llama", "loss_head": "triton", "fp32_upcast": "False", "adapter_dtype": "bfloat16"}
    for step, wanted in (
        (recorded, ("qwen2", "full", True, "float32")),
        (step_from_row(row | told), ("llama", "triton", False, "bfloat16")),
    ):
        assert (step.model["model_type"], step.loss_head, step.fp32_upcast, step.adapter_dtype) == wanted
    assert not recorded.expandable  # these were recorded with the plain allocator

"""`python -m benchmarks.gpu` end to end without a card: every step, in processes of its own, on the pretended one of `gpu_shim`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import bitsandbytes as bnb
import pytest
import torch

from benchmarks import gpu, gpu_cases, gpu_model, gpu_report
from benchmarks.gpu import Case
from benchmarks.gpu_model import lengths, make_tokenizer, prompts, texts
from helpers.hardware import GIB, KNOWN_GPUS
from helpers.registry import CATALOG, FAMILIES, ModelShape

BAR, NOISE = 180, 1.5  # seconds on two cores
SHIM = [sys.executable, "-m", "tests.rehearsal.gpu_shim"]


@pytest.fixture(scope="module")
def measured(root, tmp_path_factory):
    """Everything, once; (lines of the record, seconds)."""
    if not hasattr(os, "fork"):
        pytest.skip("the pretended card forks for each case")
    folder = tmp_path_factory.mktemp("gpu")
    address, record = folder / "socket", folder / "measured.jsonl"
    began = time.perf_counter()
    server = subprocess.Popen([*SHIM, str(address)], cwd=root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "CHILD", [*SHIM, str(address)])
        patch.setattr(gpu, "RECORD", record)
        patch.setattr(gpu, "card_is_there", lambda: True)
        patch.setitem(CATALOG, "tiny", None)
        try:
            while not address.exists():
                assert server.poll() is None, "the pretended card's process did not start"
                time.sleep(0.2)
            failures = gpu.main(["all", "--models", "tiny", "--limits", "1", "--steps", "3", "--timeout", "100"])
        finally:
            server.kill()
            server.wait()
    lines = [json.loads(line) for line in record.read_text(encoding="utf-8").splitlines()]
    assert not failures, "\n".join(line.get("error", "") for line in lines)
    return lines, time.perf_counter() - began


def of(measured, step):
    return [line for line in measured[0] if line["step"] == step]


@pytest.mark.slow
def test_every_step_runs_to_its_end_in_time(measured, say):
    lines, seconds = measured
    say(f"every step of benchmarks.gpu on a pretended card: {seconds:.0f} of {BAR} s")
    assert list(dict.fromkeys(line["step"] for line in lines)) == list(gpu.STEPS)
    for line in lines:
        assert line["card"] == "Pretended card" and line["driver"] and line["date"] and line["versions"]["trl"]
        assert line["plan"]["micro_batch"] * line["plan"]["accumulation"] == gpu.EFFECTIVE_BATCH
        for run in line["runs"].values():
            for kind in ("allocated", "reserved"):
                assert run[f"predicted_{kind}_mib"] > 0 and run[f"measured_{kind}_mib"] > 0
    assert seconds < BAR * NOISE


@pytest.mark.slow
def test_the_kits_trainer_is_given_the_worst_case_and_unequal_lengths(measured):
    runs = [run for line in measured[0] for run in line["runs"].values() if "losses" in run]
    assert len(runs) >= 10
    for run in runs:
        assert run["trainer"] == "OOMSafeTrainer" and run["adapters"] == ["torch.float32"]
        assert (
            run["finite_losses"] == run["steps"] > 0
            and 0 < run["micro_batches"]["worst"] < run["micro_batches"]["all"] + 1
        )
    assert of(measured, "bf16")[0]["runs"]["training"]["micro_batches"] == {"all": 3, "padded": 3, "worst": 2}


@pytest.mark.slow
def test_training_evaluation_and_generation_have_predictions_of_their_own(measured):
    for step in ("bf16", "fp16", "plain"):
        runs = of(measured, step)[0]["runs"]
        assert list(runs) == ["training", "training: evaluation", "training: generation"]
        assert len({run["predicted_allocated_mib"] for run in runs.values()}) == 3


@pytest.mark.slow
def test_the_loss_head_was_tried_before_anything_was_predicted(measured):
    """Planned for compute capability 9.0, the head would be Triton's, which cannot work here."""
    assert all(line["plan"]["loss_head"] == "torch" for line in measured[0])
    assert of(measured, "probe")[0]["triton_works"] is False


@pytest.mark.slow
def test_fp16_is_what_a_t4_does(measured):
    for line in of(measured, "fp16"):
        assert line["plan"]["dtype"] == "float16"
        assert line["attention"] == {"flash": False, "efficient": True, "cudnn": False, "keys_repeated": True}
        assert line["runs"]["training"]["gradient_scaler"] and line["runs"]["training"]["skipped_steps"] > 0
    bf16 = of(measured, "bf16")[0]
    assert bf16["attention"]["flash"] and not bf16["attention"]["keys_repeated"]
    assert not bf16["runs"]["training"]["gradient_scaler"]


@pytest.mark.slow
def test_running_out_of_memory_is_answered_with_the_same_loss(measured):
    replay, offload = of(measured, "oom")
    assert replay["comparisons"]["with too little room"]["changes"] == [
        {"micro_batch": 4, "checkpointing": "off", "offload": False}
    ]
    assert offload["comparisons"]["with too little room"]["changes"] == [
        {"micro_batch": 1, "checkpointing": "on", "offload": True}
    ]
    assert (
        offload["runs"]["in host memory"]["predicted_reserved_mib"]
        < offload["runs"]["on the card"]["predicted_reserved_mib"]
    )
    compared = [*replay["comparisons"].values(), *offload["comparisons"].values()]
    assert max(one["losses_differ_by"] for one in compared) < 1e-3


@pytest.mark.slow
def test_a_selective_checkpoint_of_fp16_goes_on_in_both_formats(measured):
    (line,) = of(measured, "resume")
    assert list(line["runs"]) == ["fp16 throughout", "fp16 in fp16", "fp16 in bf16"]
    assert [run["gradient_scaler"] for run in line["runs"].values()] == [True, True, False]
    assert all(run["checkpointing_found"] == "selective" for run in line["runs"].values())
    assert line["runs"]["fp16 in bf16"]["first_step"] == 2
    assert max(one["losses_differ_by"] for one in line["comparisons"].values()) < 1e-3


@pytest.mark.slow
def test_the_other_steps_say_what_they_are_for(measured):
    assert set(of(measured, "probe")[0]) >= {
        "dry_run_took_mib",
        "flash",
        "triton_works",
        "release",
        "outside_at_first_mib",
    }
    assert of(measured, "probe")[0]["release"]["returned_mib"] > 0
    assert [run["batch"] for run in of(measured, "generate")[0]["runs"].values()] == [8, 48]
    plain = of(measured, "plain")[0]
    assert plain["expandable"] is False and plain["environment"]["PYTORCH_ALLOC_CONF"] == "expandable_segments:False"
    assert of(measured, "bf16")[0]["expandable"] is True


@pytest.mark.slow
def test_the_warm_up_is_not_in_the_seconds(measured):
    """The first two of three steps are made slower by a second each."""
    run = of(measured, "plain")[0]["runs"]["training"]
    assert run["seconds"] > 2 and run["seconds_per_step"] < run["seconds"] - 2


@pytest.mark.slow
def test_the_report_has_a_sentence_for_everything_that_was_measured(measured):
    assert gpu_report.NOTHING not in gpu_report.table(measured[0])


# ------------------------------------------------------------------------------------------------- without a process


def test_without_a_card_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(gpu, "card_is_there", lambda: False)
    assert gpu.main(["bf16"]) == 0
    assert capsys.readouterr().out == "no CUDA card here: nothing to measure\n"


def test_all_steps_are_short_enough_to_be_commands_of_ten_minutes():
    assert gpu.STEP_SECONDS < 600
    cases = [case for step in gpu.STEPS.values() for case in step([], [], 0)]
    assert {case.model for case in cases} <= set(CATALOG) and len(cases) < 20
    assert {case.gib for case in gpu.bf16([], [], 0)} == {8, 12} and len(gpu.bf16([], [], 0)) == 6
    assert [(case.gib, case.steps) for case in gpu.fp16([], [], 0)][:2] == [(14.56, 50)] * 2


@pytest.fixture
def child(monkeypatch, tmp_path):
    """Cases are answered by this Python program instead."""
    monkeypatch.setattr(gpu, "RECORD", tmp_path / "measured.jsonl")
    return lambda program: monkeypatch.setattr(gpu, "CHILD", [sys.executable, "-c", program])


CASE = Case("bf16", "training", "Llama-3.2-1B-Instruct", 8)


def test_a_case_that_takes_too_long_is_ended_and_what_it_knew_is_kept(child):
    child("import sys, time; open(sys.argv[2], 'w').write('{\"card\": \"X\"}'); time.sleep(60)")
    result = gpu.run_case(CASE, 1)
    assert result["error"] == "timed out after 1 s" and result["card"] == "X" and result["gib"] == 8
    assert result["case_seconds"] < 10


def test_a_case_that_fails_leaves_its_last_words_and_the_next_one_runs(child, capsys):
    child("import sys; sys.exit('out of luck' if '8' in sys.argv[1] else 0)")
    assert gpu.run_step("bf16", [CASE, CASE], 30, 60) == 2
    lines = [json.loads(line) for line in gpu.RECORD.read_text(encoding="utf-8").splitlines()]
    assert [line["error"] for line in lines] == ["out of luck"] * 2
    assert "out of luck" in capsys.readouterr().out


def test_the_record_does_not_say_where_things_are_installed(child, tmp_path, monkeypatch):
    inner = tmp_path / "lib" / "package" / "part.py"
    inner.parent.mkdir(parents=True)
    inner.write_text("raise RuntimeError('broken')\n")
    monkeypatch.setenv("BROKEN", str(inner))  # a traceback may show the command itself
    child("import os, runpy; runpy.run_path(os.environ['BROKEN'])")
    error = gpu.run_case(CASE, 30)["error"]
    assert str(tmp_path) not in error and 'lib/package/part.py", line 1' in error.replace("\\", "/")


def test_cases_without_time_are_named(child, capsys):
    child("")
    assert gpu.run_step("bf16", [CASE], 240, 5) == 0
    assert "skipped, no time is left" in capsys.readouterr().out and not gpu.RECORD.exists()


def test_the_planned_card_has_the_size_and_the_traits_of_the_case(monkeypatch):
    monkeypatch.setattr(gpu_cases, "detect_gpu", lambda: replace(KNOWN_GPUS["RTX 4090"], flash=True))
    card, t4 = gpu_cases.planned_card(CASE), gpu_cases.planned_card(replace(CASE, fp16=True))
    assert (
        card.free_bytes == card.total_bytes == 8 * GIB and card.has_context and card.flash and card.capability == (8, 9)
    )
    assert t4.capability == (7, 5) and not t4.flash and t4.free_bytes == 8 * GIB
    with pytest.raises(gpu_cases.Skipped, match=r"24\.0 GiB, not 30"):
        gpu_cases.planned_card(replace(CASE, gib=30))
    monkeypatch.setattr(gpu_cases, "detect_gpu", lambda: KNOWN_GPUS["T4"])
    with pytest.raises(gpu_cases.Skipped, match="no bf16"):
        gpu_cases.planned_card(CASE)


@pytest.mark.parametrize("micro_batch", [1, 2, 4, 8])
def test_lengths_hold_the_planned_worst_case_first_and_are_unequal(micro_batch):
    sizes = lengths(24, micro_batch, 1024, 8)
    for step in (sizes[:8], sizes[16:]):
        worst = sorted(step)[-micro_batch:]
        assert worst.count(1024) == max(1, micro_batch - 1) and (micro_batch == 1 or min(worst) < 1024)
    assert max(sizes[8:16]) < 1024 and len(set(sizes[8:16])) == 4


def test_texts_and_prompts_have_the_tokens_that_were_asked_for():
    tokenizer = make_tokenizer()
    made = [len(tokenizer(row["text"] + tokenizer.eos_token)["input_ids"]) for row in texts([64, 48, 2])]
    assert made == [64, 48, 2]
    asked = [
        tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
        for prompt in prompts(5, 64)
    ]
    assert max(map(len, asked)) == 64 and len({len(ids) for ids in asked}) == 4


def test_equal_lengths_are_not_taken_for_the_worst_case():
    class Plan:
        seq_len, micro_batch = 8, 2

    trainers = [SimpleNamespace(compute_loss=None) for _ in range(3)]
    equal, worst, shorter = (gpu_cases.Shapes(trainer, Plan) for trainer in trainers)
    equal.count([8, 8]), worst.count([8, 6]), shorter.count([7, 6])
    assert (
        (equal.worst, equal.padded) == (0, 0)
        and (worst.worst, worst.padded) == (1, 1)
        and (shorter.worst, shorter.padded) == (0, 1)
    )


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_model_of_every_family_is_built_and_calculates(family, monkeypatch):
    monkeypatch.setattr(gpu_model, "DEVICE", "cpu")
    shape = ModelShape(family, 64, 128, 2, 4, 4 if family == "phi3" else 2, 16, 512, family != "phi3", 128)
    model = gpu_model.random_model(shape, torch.float32)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == shape.tie_word_embeddings
    assert sum(isinstance(module, bnb.nn.Linear4bit) for module in model.modules()) == 2 * len(shape.linear_layers())
    plain = type(model)(model.config)
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(model.get_buffer(name), buffer)
    with torch.no_grad():
        assert model(torch.arange(8)[None]).logits.isfinite().all()


# -------------------------------------------------------------------------------------------------------- the report


def test_readme_holds_what_the_report_writes(root):
    readme = (root / "README.md").read_text(encoding="utf-8")
    assert gpu_report.BEGIN in readme and readme == gpu_report.with_table(readme, gpu_report.read()), "make gpu-report"


def test_what_nobody_measured_is_said_to_be_so():
    rows = gpu_report.table([]).splitlines()[2:]
    assert len(rows) == len(gpu_report.ROWS) and all(f"| {gpu_report.NOTHING} |" in row for row in rows)


def test_the_report_counts_the_last_measurement_of_a_case_and_names_failures(monkeypatch, tmp_path):
    def line(gib, measured=0, **more):
        run = {"predicted_reserved_mib": 1000, "measured_reserved_mib": measured, "seconds_per_step": 0.5}
        return (
            {"step": "bf16", "kind": "training", "model": "m", "gib": gib, "card": "C", "date": "2026-11-24"}
            | ({"runs": {"training": run}} if measured else {})
            | more
        )

    record = tmp_path / "measured.jsonl"
    record.write_text(
        "".join(json.dumps(one) + "\n" for one in [line(8, 2000), line(8, 990), line(12, error="a\nout | of luck")])
    )
    monkeypatch.setattr(gpu_report, "RECORD", record)
    (row,) = [row for row in gpu_report.table(gpu_report.read()).splitlines() if "training in bf16" in row]
    assert "−1.0 % (1 measured); 0.50 s a step; 1 failed: out / of luck" in row and "C, 2026-11-24" in row

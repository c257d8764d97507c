"""How exact are the dry run, the formula and the plans? Every figure that we claim about memory, as one command.

    python -m benchmarks.memory_accuracy [--only t4 grid speed legacy plans]

- t4      the dry run against 41 steps that were measured on a Tesla T4
- grid    the formula against the dry run: 1B to 13B, 512 to 8192 tokens, checkpointing on and off
- speed   one factor for the T4's step times, and how far off the fitted times are
- legacy  a table of what fitted a T4 in 2023 (7B and 13B), with the recipe of that time
- plans   plans for real cards, and how long each took to make
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from dataclasses import replace
from pathlib import Path

from benchmarks.memory_rows import step_from_row
from helpers.config import TrainConfig
from helpers.dryrun import Step, measure
from helpers.hardware import DATA_SHEETS, GIB, KNOWN_GPUS, MIB
from helpers.memory import CUDA_CONTEXT, estimate
from helpers.planner import DoesNotFit, make_plan
from helpers.registry import CATALOG

T4_ROWS = Path(__file__).parent / "data" / "t4_measured.csv"
GRID_MODELS = [
    "Llama-3.2-1B-Instruct",
    "Llama-3.2-3B-Instruct",
    "Mistral-7B-Instruct-v0.3",
    "Llama-3.1-8B-Instruct",
    "Llama-2-13b-chat-hf",
]
GRID_TOKENS = [512, 1024, 2048, 4096, 8192]
PLANS = [
    ("T4", "Llama-3.2-1B-Instruct"),
    ("T4", "Llama-3.1-8B-Instruct"),
    ("T4", "Llama-2-13b-chat-hf"),
    ("RTX 4060", "Llama-3.2-3B-Instruct"),
    ("RTX 4060", "Llama-3.1-8B-Instruct"),
    ("RTX 3060", "Llama-2-13b-chat-hf"),
    ("RTX 4070 Ti SUPER", "Llama-2-13b-chat-hf"),
]


def mean(values: list[float]) -> float:
    return statistics.fmean(abs(value) for value in values)


def t4() -> dict[str, tuple[float, float]]:
    """(mean, worst) relative error of the dry run, for allocated and reserved memory."""
    rows = list(csv.DictReader(T4_ROWS.open(encoding="utf-8")))
    errors: dict[str, list[float]] = {"allocated": [], "reserved": []}
    for row in rows:
        result = measure(step_from_row(row))
        for kind, values in errors.items():
            values.append(getattr(result, kind) / MIB / float(row[f"measured_peak_{kind}_mib"]) - 1)
        print(
            f"  {row['model']:<28}{row['base_weights']:<6}{row['attention']:<16}{row['batch_size']:>3} x {row['seq_len']:<6}"
            f"allocated {errors['allocated'][-1]:+7.2%}   reserved {errors['reserved'][-1]:+7.2%}",
            flush=True,
        )
    for kind, values in errors.items():
        print(f"T4, {len(rows)} rows, {kind}: mean {mean(values):.2%}, worst {max(values, key=abs):+.2%}")
    return {kind: (mean(values), max(values, key=abs)) for kind, values in errors.items()}


def grid(models: list[str] = GRID_MODELS, tokens: list[int] = GRID_TOKENS) -> list[float]:
    """Relative errors of the formula against the dry run, training memory only (without the driver's part)."""
    errors = []
    for name in models:
        shape = CATALOG[name].shape
        for checkpointing in ("on", "selective", "off"):
            for count in tokens:
                micro_batch, seq_len = max(1, count // 1024), min(count, 1024)
                step = Step(
                    shape.to_config(),
                    micro_batch,
                    seq_len,
                    checkpointing=checkpointing,
                    masked=micro_batch > 1,
                    attention="efficient" if micro_batch > 1 else "flash",
                )
                exact = measure(step).live_peak
                formula = estimate(
                    shape, micro_batch, seq_len, checkpointing=checkpointing, attention=step.attention, on_gpu=False
                )
                errors.append(formula.total_bytes / exact - 1)
                print(
                    f"  {name:<28}checkpointing {checkpointing:<10}{count:>6} tokens: dry run {exact / GIB:6.2f}, "
                    f"formula {formula.total_bytes / GIB:6.2f} GiB, {errors[-1]:+.2%}",
                    flush=True,
                )
    print(
        f"formula against dry run, {len(errors)} points: mean {mean(errors):.2%}, lowest {min(errors):+.2%}, highest {max(errors):+.2%}"
    )
    return errors


def speed() -> tuple[float, float]:
    """(factor that fits the T4's measured seconds best, mean relative error with it)."""
    rows = list(csv.DictReader(T4_ROWS.open(encoding="utf-8")))
    teraflops, gigabytes = DATA_SHEETS["T4"]
    ideal, measured = [], []
    for row in rows:
        result = measure(step_from_row(row))
        ideal.append(result.flops / (teraflops * 1e12) + result.bytes_moved / (gigabytes * 1e9))
        measured.append(float(row["measured_step_seconds"]))
    ratios = [real / best for real, best in zip(measured, ideal)]
    factor = statistics.median(ratios)
    errors = [factor * best / real - 1 for real, best in zip(measured, ideal)]
    print(
        f"T4 step times: factor {factor:.2f} (ratios {min(ratios):.2f} to {max(ratios):.2f}); with it, error mean {mean(errors):.0%}, "
        f"worst {max(errors, key=abs):+.0%}"
    )
    return factor, mean(errors)


# Published in 2023 (the 4-bit post on Hugging Face's blog): batch 1, accumulation 4, AdamW, LLaMA 1 on a T4; NF4 rows.
LEGACY = [
    ("7B", "nf4, no checkpointing", 512, {"checkpointing": "off", "double_quant": False}, True),
    ("7B", "nf4, no checkpointing", 1024, {"checkpointing": "off", "double_quant": False}, False),
    ("7B", "nf4, checkpointing", 1024, {"double_quant": False}, True),
    ("13B", "nf4, checkpointing", 512, {"double_quant": False}, True),
    ("13B", "nf4, checkpointing", 1024, {"double_quant": False}, False),
    ("13B", "nf4, checkpointing, double quantization", 1024, {"double_quant": True}, True),
]


def legacy() -> int:
    """How many of the published verdicts the dry run gives too, with full logits, fp32 upcast and AdamW in fp32."""
    shapes = {"13B": CATALOG["Llama-2-13b-chat-hf"].shape}
    shapes["7B"] = replace(
        shapes["13B"],
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
    )
    agreed = 0
    for size, words, seq_len, settings, published in LEGACY:
        step = Step(
            shapes[size].to_config(),
            1,
            seq_len,
            dtype="float16",
            attention="eager",
            loss_head="full",
            fp32_upcast=True,
            optimizer="adamw_torch",
            autocast=True,
            r=8,
            target_modules=["q_proj", "v_proj"],
            **settings,
        )
        need = measure(step).reserved + CUDA_CONTEXT
        fits = need <= KNOWN_GPUS["T4"].total_bytes
        agreed += fits == published
        print(
            f"  LLaMA {size:<4}{words:<42}{seq_len:>5} tokens: {need / GIB:5.1f} GiB, we say {'fits' if fits else 'OOM':<5}"
            f"published {'fits' if published else 'OOM':<5}{'' if fits == published else '  <-- differs'}"
        )
    print(f"legacy table: {agreed} of {len(LEGACY)} verdicts agree")
    print(
        "  Where we say fits and OOM was published: the step's own tensors leave gigabytes free, so what ran out was something else;\n"
        "  the likeliest is loading, which in 2023 put whole shards in 16 bit on the card before quantizing them (not verified)."
    )
    return agreed


def plans() -> float:
    """The slowest plan, in seconds."""
    slowest = 0.0
    for card, name in PLANS:
        config = TrainConfig(max_length=2048, effective_batch_size=16)
        started = time.perf_counter()
        try:
            plan = make_plan(config, KNOWN_GPUS[card], CATALOG[name])
            words = (
                f"micro-batch {plan.micro_batch} x {plan.accumulation}, {plan.seq_len} tokens, checkpointing {plan.checkpointing}"
                f"{', offload' if plan.offload else ''}, {plan.peak_bytes / GIB:.1f} GiB"
            )
        except DoesNotFit as error:
            words = str(error)
        spent = time.perf_counter() - started
        slowest = max(slowest, spent)
        print(f"  {card:<18}{name:<26}{spent:5.1f} s  {words}", flush=True)
    print(f"slowest plan: {slowest:.1f} s")
    return slowest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = {function.__name__: function for function in (t4, grid, speed, legacy, plans)}
    parser.add_argument("--only", nargs="+", choices=parts, default=list(parts))
    for name in parser.parse_args().only:
        print(f"\n{name}: {parts[name].__doc__.splitlines()[0]}")
        parts[name]()


if __name__ == "__main__":
    main()

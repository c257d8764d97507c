"""Predictions of the dry run beside a CSV of measured steps, and how far off they are.

python -m benchmarks.memory_rows benchmarks/data/t4_measured.csv
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

from helpers.dryrun import DryRunError, Step, measure
from helpers.hardware import MIB

FAMILY_BY_NAME = {
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "mistral": "mistral",
    "gemma-2": "gemma2",
    "smollm3": "smollm3",
    "phi-3": "phi3",
}


def step_from_row(row: dict[str, str]) -> Step:
    """A line of a CSV with measured steps, as a `Step`. Columns that are absent mean the recipe of the recorded T4 runs."""

    def flag(name: str, default: bool) -> bool:
        return row[name].strip().lower() in ("true", "1", "yes") if row.get(name) else default

    name = row["model"].lower()
    family = row.get("model_type") or next((kind for part, kind in FAMILY_BY_NAME.items() if part in name), "llama")
    integers = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "vocab_size",
    )
    model = {
        "model_type": family,
        "tie_word_embeddings": flag("tie_word_embeddings", False),
        "max_position_embeddings": 32768,
    }
    model |= {key: int(row[key]) for key in integers}
    quantized = row["base_weights"] == "nf4"
    return Step(
        model=model,
        micro_batch=int(row["batch_size"]),
        seq_len=int(row["seq_len"]),
        r=int(row["lora_rank"]),
        target_modules=row["lora_targets"] if row["lora_targets"] == "all-linear" else row["lora_targets"].split("+"),
        adapter_dtype=row.get("adapter_dtype") or "float32",
        quantization="nf4" if quantized else "none",
        double_quant=flag("double_quant", False),
        dtype=row["compute_dtype"],
        checkpointing="on" if flag("gradient_checkpointing", True) else "off",
        attention=row["attention"].removeprefix("sdpa-"),
        loss_head=row.get("loss_head") or "full",
        optimizer="adamw_torch" if row["optimizer"].startswith("adamw_torch") else "adamw_8bit",
        fp32_upcast=flag("fp32_upcast", quantized),
        load_in=row["compute_dtype"],
        autocast=False,
    )


def main() -> int:
    """Print a CSV of measured steps with our predictions added, and how far off they are.

    The columns are those of benchmarks/data/t4_measured.csv; `model_type`, `loss_head`, `fp32_upcast` and `adapter_dtype` may be
    added. Without them the recipe of that file is meant: full logits, fp32 upcast for nf4 rows, fp32 adapters, family by name.
    """
    parser = argparse.ArgumentParser(description=main.__doc__.splitlines()[0])
    parser.add_argument("rows", type=Path, help="CSV file with measured steps")
    path = parser.parse_args().rows
    if not path.is_file():
        parser.error(f"no file at {path.resolve()}")
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        parser.error(f"{path} has no rows")

    errors: dict[str, list[float]] = {"allocated": [], "reserved": []}
    writer = csv.DictWriter(
        sys.stdout, [*rows[0], "predicted_allocated_mib", "predicted_reserved_mib"], lineterminator="\n"
    )
    writer.writeheader()
    for number, row in enumerate(rows, start=2):
        try:
            result = measure(step_from_row(row))
        except (KeyError, ValueError, DryRunError) as error:
            parser.error(
                f"{path}, line {number}: {type(error).__name__} {error}; the columns are those of benchmarks/data/t4_measured.csv"
            )
        for kind in errors:
            predicted = getattr(result, kind) / MIB
            row[f"predicted_{kind}_mib"] = f"{predicted:.1f}"
            if row.get(f"measured_peak_{kind}_mib"):
                errors[kind].append(predicted / float(row[f"measured_peak_{kind}_mib"]) - 1)
        writer.writerow(row)
        sys.stdout.flush()
    for kind, values in errors.items():
        if values:
            mean, worst = sum(map(abs, values)) / len(values), max(values, key=abs)
            print(f"{kind}: mean {mean:.2%}, worst {worst:+.2%}".replace("%", " %"))
        else:
            print(f"{kind}: nothing measured to compare with")
    return 0


if __name__ == "__main__":
    sys.exit(main())

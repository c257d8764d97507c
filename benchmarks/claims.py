"""The numbers that fine-tuning articles quote, beside what this kit calculates and measures.

    python -m benchmarks.claims              # the page, and below it what this machine has measured itself
    python -m benchmarks.claims --write      # the page into notebooks/CLAIMS.md
    python -m benchmarks.claims --exact      # memory rows from the dry run too (minutes), to see how far the formula is off

Memory comes from `helpers.memory` (within about 3 % of the dry run: `python -m benchmarks.memory_accuracy`), for one optimizer step
on a card with flash attention. GB are 10^9 bytes, as articles mean them; GiB are 2^30, as the driver counts.
"""

from __future__ import annotations

import argparse
import ast
import json
from dataclasses import dataclass

import nbformat

from benchmarks.claims_measured import RECORD
from helpers.hardware import GIB, KNOWN_GPUS
from helpers.memory import QUANTIZATION_BLOCK, estimate, flops_and_bytes, nf4_bytes
from helpers.registry import CATALOG, ModelShape
from tools import course

GB = 10**9
PAGE = course.ROOT / "notebooks" / "CLAIMS.md"
SEVEN = [
    "Mistral-7B-Instruct-v0.3",
    "Qwen2.5-7B-Instruct",
    "Llama-3.1-8B-Instruct",
]  # what is sold as "7B" has 7.2 to 8.0 billion
THIRTEEN = "Llama-2-13b-chat-hf"
LADDER = ["SmolLM2-135M-Instruct", "Qwen2.5-1.5B-Instruct", "Mistral-7B-Instruct-v0.3", THIRTEEN]
BATCHES = [(1, 512), (4, 512), (4, 2048)]  # micro-batch, tokens per example
USUAL = {
    "double_quant": False,
    "fp32_upcast": True,
    "optimizer_bytes": 8,
    "loss_head": "full",
}  # the recipe of most tutorials
# Bytes per parameter of full fine-tuning: weights, gradients, and AdamW's two averages. (16-bit weights and gradients with an fp32 copy
# and fp32 averages, as mixed precision is usually done, make 2 + 2 + 4 + 8: the same as fp32 throughout.)
FULL = {"fp32, or 16 bit with an fp32 copy": 4 + 4 + 8, "bf16 throughout": 2 + 2 + 4}


@dataclass(frozen=True)
class Claim:
    """One row: what is said, what we get, where the saying holds, and the command that shows it again."""

    quoted: str
    ours: str
    holds: str
    again: str


def shape(name: str) -> ModelShape:
    return CATALOG[name].shape


def span(values: list[float], form: str) -> str:
    """ "5.9 to 9.6" from the lowest and the highest of `values`."""
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low} to {high}"


def percent(share: float, digits: int = 0) -> str:
    return f"{share:.{digits}%}".replace("%", " %").replace("-", "−")


def whole_model_ratio(of: ModelShape) -> float:
    """Bytes with 4-bit linear layers, as a share of the bytes in 16 bit."""
    return (nf4_bytes(of.linear_parameters()) + 2 * of.other_parameters()) / (2 * of.parameters())


def saving(of: ModelShape, micro_batch: int, seq_len: int) -> float:
    """Share of the peak that checkpointing saves, as a negative number."""
    off, on = (estimate(of, micro_batch, seq_len, checkpointing=mode).total_bytes for mode in ("off", "on"))
    return on / off - 1


def more_work(of: ModelShape, micro_batch: int, seq_len: int) -> float:
    """Additional floating-point operations with checkpointing, as a share."""
    off, on = (flops_and_bytes(of, micro_batch, seq_len, mode)[0] for mode in ("off", "on"))
    return on / off - 1


def code_lines(source: str) -> int:
    """Lines that hold code: no comments, no docstrings, nothing empty."""
    tree = ast.parse(source)
    docstrings = {
        line
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node)
        for line in range(node.body[0].lineno, node.body[0].end_lineno + 1)
    }
    return sum(
        bool(line.strip()) and not line.strip().startswith("#") and number not in docstrings
        for number, line in enumerate(source.splitlines(), start=1)
    )


def quickstart_lines() -> int:
    """Lines of the quickstart, without the first cell, which only fetches the kit."""
    _, *cells = course.code_cells(nbformat.read(course.ROOT / "notebooks" / "00_quickstart.ipynb", as_version=4))
    return sum(len(course.lines_of_code(cell)) for cell in cells)


def script_lines() -> int:
    """Lines of the script that `helpers.export.export_script` writes."""
    return code_lines((course.ROOT / "helpers/export/templates/train.py").read_text(encoding="utf-8"))


def claims() -> list[Claim]:
    sevens, thirteen = [shape(name) for name in SEVEN], shape(THIRTEEN)
    sizes = [of.parameters() for of in sevens]
    lora = [estimate(of, 1, 512, quantization="none").total_bytes / GIB for of in sevens]
    fitting = sum(size * GIB <= 16 * GB for size in lora)
    qlora = [estimate(of, 1, 512).total_bytes / GIB for of in sevens]
    usual_13b = [estimate(thirteen, 1, tokens, **USUAL).total_bytes / GB for tokens in (512, 2048)]
    ours_13b = [estimate(thirteen, 1, tokens).total_bytes / GB for tokens in (512, 2048)]
    savings = [saving(shape(name), *batch) for name in LADDER for batch in BATCHES]
    works = [more_work(shape(name), *batch) for name in LADDER for batch in BATCHES]
    bits = 8 * nf4_bytes(10**9) / 10**9
    ratios = [whole_model_ratio(shape(name)) for name in LADDER]
    trainable = [shape(name).lora_parameters(16) / shape(name).parameters() for name in LADDER]
    few = [shape(name).lora_parameters(8, ["q_proj", "v_proj"]) / shape(name).parameters() for name in LADDER]
    measured = json.loads(RECORD.read_text(encoding="utf-8"))
    epochs = "; ".join(f"lowest after {row['best_epoch']:g} epochs with {row['examples']} examples" for row in measured)
    t4 = KNOWN_GPUS["T4"].total_bytes / GIB
    memory = "`python -m benchmarks.claims --exact`"
    return [
        Claim(
            "A 7B model needs 28 GB in fp32.",
            f"{span([4 * n / GB for n in sizes], '{:.0f}')} GB",
            "Right for exactly 7.0 billion parameters, weights only. Nobody loads them so any more: files are in 16 bit.",
            "[lesson 01](01_load_quantized_model.ipynb)",
        ),
        Claim(
            "Full fine-tuning of a 7B model needs 80 GB and more.",
            "; ".join(
                f"{span([each * n / GB for n in sizes], '{:.0f}')} GB at {each} bytes per parameter ({how})"
                for how, each in FULL.items()
            )
            + "; activations come on top",
            "An understatement for AdamW with fp32 averages. In bf16 throughout it is less, at the price of lost small updates.",
            "`python -m benchmarks.claims`",
        ),
        Claim(
            "LoRA on a 7B model fits in 16 GB.",
            f"{span(lora, '{:.1f}')} GiB with 16-bit weights, one example of 512 tokens; QLoRA {span(qlora, '{:.1f}')} GiB",
            f"16 GB are {16 * GB / GIB:.1f} GiB, and free Colab's T4 has {t4:.2f}: with 16-bit weights {fitting} of {len(lora)} models "
            "stays below the former, with nothing to spare. With QLoRA it holds for all, with room to spare.",
            memory,
        ),
        Claim(
            "QLoRA on a 13B model needs 10 GB.",
            f"{span(ours_13b, '{:.1f}')} GB here, {span(usual_13b, '{:.1f}')} GB by the usual recipe (one example of 512 to 2048 tokens)",
            "Right for one short example at a time, with checkpointing. Longer or more examples need more; the number says nothing "
            "without them.",
            memory,
        ),
        Claim(
            "NF4 is a quarter of fp16.",
            f"{bits:.2f} bits instead of 16 in the quantized layers, which is {percent(bits / 16, 1)}; whole models "
            f"{span([100 * value for value in ratios], '{:.0f}')} %",
            f"Nearly right for what is quantized (each {QUANTIZATION_BLOCK} weights need a scale). Embedding, output layer and norms stay in "
            "16 bit, so small models shrink least.",
            "[lesson 01](01_load_quantized_model.ipynb)",
        ),
        Claim(
            "Checkpointing saves 60 % of memory and costs 20 % of time.",
            f"{percent(max(savings))} to {percent(min(savings))} of the peak; {percent(min(works))} to {percent(max(works))} more arithmetic",
            "Somewhere in the middle. What it saves grows with the tokens in a micro-batch, because weights stay. It costs more "
            "than 20 % of arithmetic in LoRA: with frozen weights a step is two passes (forward, and back to the inputs), and a third "
            "recomputes; in full fine-tuning three become four.",
            "[lesson 04](04_train.ipynb); `python -m benchmarks.claims_measured --only checkpointing_time`",
        ),
        Claim(
            "LoRA trains less than 1 % of the parameters.",
            f"{span([100 * value for value in trainable], '{:.1f}')} % with r=16 on all linear layers; "
            f"{span([100 * value for value in few], '{:.2f}')} % with r=8 on queries and values",
            "Right for 7B and more, or for few target modules. A small model's share is several times as large, because matrices "
            "grow with the square of their width and adapters do not.",
            "[lesson 02](02_attach_lora.ipynb)",
        ),
        Claim(
            "After 2 to 3 epochs it overfits.",
            f"validation loss {epochs} (one model, one learning rate, one data set)",
            "There is no such number: it depends on examples, learning rate and rank. Look at the validation loss, and let early stopping decide.",
            "`python -m benchmarks.claims_measured --only overfitting`; [lesson 05](05_plot_and_evaluate.ipynb)",
        ),
        Claim(
            "The whole script has 50 lines.",
            f"{quickstart_lines()} lines in the quickstart, on top of this package; {script_lines()} in the exported script, without it",
            "Right as long as a library does the rest. What the longer one adds: precision that is right on a T4, validation loss per "
            "token, going on after an interruption, several GPUs.",
            "`helpers.export.export_script(run)`; [lesson 06](06_save_and_use.ipynb)",
        ),
    ]


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def page() -> str:
    """The whole page; only what does not depend on the machine, and what was recorded."""
    rows = [[claim.quoted, claim.ours, claim.holds, claim.again] for claim in claims()]
    details = [
        [
            name.removesuffix("-Instruct"),
            f"{tokens * micro:,}",
            *(
                f"{estimate(shape(name), micro, tokens, checkpointing=mode).total_bytes / GIB:.1f}"
                for mode in ("off", "on")
            ),
            percent(saving(shape(name), micro, tokens)),
            f"+{percent(more_work(shape(name), micro, tokens))}",
        ]
        for name in LADDER
        for micro, tokens in BATCHES
    ]
    losses = "".join(
        f"- {row['examples']} examples, learning rate {row['learning_rate']:g}, {row['model'].split('/')[-1]}: "
        + ", ".join(f"{loss:.2f} ({float(epoch):g})" for epoch, loss in row["validation_loss_by_epoch"].items())
        + "\n"
        for row in json.loads(RECORD.read_text(encoding="utf-8"))
    )
    return f"""# Numbers that people quote, and ours

Made by `python -m benchmarks.claims --write`; a test keeps it so. GB are 10^9 bytes, GiB 2^30. Memory is the peak of one optimizer step
with flash attention, rank 16 on all linear layers, by the formula of `helpers.memory`, which lies within about 3 % of the dry run; that in turn lies
within 0.4 % of 41 recorded T4 steps (`python -m benchmarks.memory_accuracy` shows both). Nothing here was measured on a GPU of ours.

{table(["people say", "we get", "where it holds", "see it again"], rows)}

## Checkpointing, by model and by tokens in a micro-batch

{table(["model", "tokens", "GiB, off", "GiB, on", "peak", "arithmetic"], details)}

How many seconds the arithmetic is depends on the machine: a GPU that waits for memory hides part of it. Lesson 04 measures yours.

## Validation loss by epoch, as recorded on two CPU cores

Loss, and in brackets the epoch (0 is the untrained model). The recording is `benchmarks/data/{RECORD.name}`.

{losses}"""


def print_measured() -> None:
    """What depends on this machine: printed only, if there is something."""
    file = course.ROOT / "runs" / "quickstart" / "executions.jsonl"
    if file.is_file():
        first = json.loads(file.read_text(encoding="utf-8").splitlines()[0])
        print(
            f"Quickstart on this machine: {first['seconds'] / 60:.1f} minutes, {first['peak_memory_gib']} GiB of RAM."
        )
    else:
        print("No quickstart has run on this machine yet: make quickstart")


def print_exact() -> None:
    """The memory rows again, by the dry run."""
    from helpers.dryrun import Step, measure
    from helpers.memory import CUDA_CONTEXT

    for name in [*SEVEN, THIRTEEN]:
        for quantization in ("none", "nf4"):
            of, tokens = shape(name), 512
            formula = estimate(of, 1, tokens, quantization=quantization).total_bytes
            exact = measure(Step(of.to_config(), 1, tokens, quantization=quantization)).allocated + CUDA_CONTEXT
            print(
                f"{name:<28}{quantization:<6}{tokens} tokens: formula {formula / GIB:5.1f}, dry run {exact / GIB:5.1f} GiB, "
                f"{formula / exact - 1:+.1%}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.relative_to(course.ROOT)}")
    parser.add_argument("--exact", action="store_true", help="the memory rows by the dry run, too")
    chosen = parser.parse_args()
    if chosen.write:
        PAGE.write_text(page(), encoding="utf-8")
        print(f"{PAGE.relative_to(course.ROOT)} written")
        return
    print(page())
    print_measured()
    if chosen.exact:
        print_exact()


if __name__ == "__main__":
    main()

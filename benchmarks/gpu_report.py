"""What was measured on a real card, as the table in README.

    python -m benchmarks.gpu_report          # or: make gpu-report

Reads benchmarks/data/gpu_measured.jsonl, which `python -m benchmarks.gpu` writes, and puts the table between two comments in README.md.
Of a case that was measured several times, the last one counts.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from typing import Any

from benchmarks.gpu import RECORD, ROOT

README = ROOT / "README.md"
BEGIN, END = "<!-- gpu:begin -->", "<!-- gpu:end -->"
NOTHING = "not measured yet"
Line = dict[str, Any]
SAME_CASE = ("step", "kind", "model", "gib", "fp16", "head", "forced", "expandable", "max_length", "batches")


def read() -> list[Line]:
    """The last line of each case, in the order in which cases were first measured."""
    text = RECORD.read_text(encoding="utf-8") if RECORD.is_file() else ""
    return list(
        {
            json.dumps([line.get(name) for name in SAME_CASE]): line for line in map(json.loads, text.splitlines())
        }.values()
    )


# ------------------------------------------------------------------------------------------- one sentence for each row


def percent(share: float) -> str:
    return f"{share:+.1%}".replace("%", " %").replace("-", "−")


def span(values: list[float], form: Callable[[float], str]) -> str:
    """ "1.2 to 3.4", or one of them if they are equal."""
    return " to ".join(dict.fromkeys((form(min(values)), form(max(values)))))


def runs(lines: list[Line], ending: str) -> list[Line]:
    """Recorded parts of cases whose name is or ends with `ending`."""
    return [
        run
        for line in lines
        for name, run in line.get("runs", {}).items()
        if name == ending or name.endswith(f": {ending}")
    ]


def against_prediction(found: list[Line]) -> str:
    """How far reserved memory is from what the dry run predicted: + means that more was needed."""
    differences = [
        run["measured_reserved_mib"] / run["predicted_reserved_mib"] - 1
        for run in found
        if run["predicted_reserved_mib"]
    ]
    return f"{span(differences, percent)} ({len(differences)} measured)" if differences else ""


def seconds(found: list[Line]) -> str:
    values = [run["seconds_per_step"] for run in found if "seconds_per_step" in run]
    return f"; {span(values, lambda value: f'{value:.2f}')} s a step" if values else ""


def memory(ending: str) -> Callable[[list[Line]], str]:
    def sentence(lines: list[Line]) -> str:
        found = runs(lines, ending)
        return against_prediction(found) + seconds(found) if found else ""

    return sentence


def context(lines: list[Line]) -> str:
    return "; ".join(f"{line['dry_run_took_mib']:.0f} MiB" for line in lines if "dry_run_took_mib" in line)


def triton(lines: list[Line]) -> str:
    return "; ".join(
        "it works" if line["triton_works"] else "it does not work" for line in lines if "triton_works" in line
    )


def outside(lines: list[Line]) -> str:
    grown = [
        run["outside_after_mib"] - line["outside_at_first_mib"]
        for line in lines
        for run in runs([line], "training")
        if "outside_after_mib" in run
    ]
    return f"{span(grown, '{:.0f}'.format)} MiB" if grown else ""


def released(lines: list[Line]) -> str:
    found = [line["release"] for line in lines if "release" in line]
    return "; ".join(
        f"{one['returned_mib']:.0f} MiB back, {one['allocated_after_mib']:.0f} of {one['allocated_before_mib']:.0f} MiB still allocated"
        for one in found
    )


def as_a_t4(lines: list[Line]) -> str:
    found = runs(lines, "training")
    if not found:
        return ""
    finite, steps, skipped = (sum(run[name] for run in found) for name in ("finite_losses", "steps", "skipped_steps"))
    return f"{finite} of {steps} losses finite, {skipped} steps skipped; memory {against_prediction(found)}{seconds(found)}"


def compared(name: str) -> Callable[[list[Line]], str]:
    def sentence(lines: list[Line]) -> str:
        found = [line["comparisons"][name] for line in lines if name in line.get("comparisons", {})]
        changed = [
            f"{key} {value}" for one in found for change in one.get("changes", []) for key, value in change.items()
        ]
        differs = f"losses differ by at most {max(one['losses_differ_by'] for one in found):.2g}" if found else ""
        return "; ".join([*dict.fromkeys(changed), differs]) if found else ""

    return sentence


def at_a_time(batch: int) -> Callable[[list[Line]], str]:
    def sentence(lines: list[Line]) -> str:
        return "; ".join(
            f"{line['model']}: {run['measured_reserved_mib']:,.0f} MiB, {run['tokens_per_second']:.0f} tokens/s"
            for line in lines
            for run in runs([line], f"{batch} prompts")
            if "tokens_per_second" in run
        )

    return sentence


# what -> (the cases that show it, the sentence)
Which = Callable[[Line], bool]
ROWS: dict[str, tuple[Which, Callable[[list[Line]], str]]] = {
    "memory that a dry run takes on the card": (lambda line: line["step"] == "probe", context),
    "Triton's loss head": (lambda line: line["step"] == "probe", triton),
    "a loaded model, released": (lambda line: line["step"] == "probe", released),
    "training in bf16, 8 and 12 GiB: reserved memory against prediction": (
        lambda line: line["step"] == "bf16",
        memory("training"),
    ),
    "evaluation: the same": (lambda line: line["kind"] == "training", memory("evaluation")),
    "generation: the same": (lambda line: line["kind"] == "training", memory("generation")),
    "driver memory outside PyTorch: growth from the first context to the end of training": (
        lambda line: line["kind"] in ("probe", "training"),
        outside,
    ),
    "training in fp16 as on a T4, 14.56 GiB": (lambda line: line["step"] == "fp16", as_a_t4),
    "out of memory in a step: done again in smaller pieces": (
        lambda line: line["kind"] == "replay",
        compared("with too little room"),
    ),
    "out of memory with one example at a time": (
        lambda line: line["kind"] == "offload",
        compared("with too little room"),
    ),
    "activations planned to wait in host memory": (lambda line: line["kind"] == "offload", compared("in host memory")),
    "a checkpoint made in fp16, continued in fp16": (lambda line: line["step"] == "resume", compared("fp16 in fp16")),
    "a checkpoint made in fp16, continued in bf16": (lambda line: line["step"] == "resume", compared("fp16 in bf16")),
    "generation, 8 prompts at a time": (lambda line: line["step"] == "generate", at_a_time(8)),
    "generation, 48 prompts at a time": (lambda line: line["step"] == "generate", at_a_time(48)),
    "training without expandable segments, as on Windows": (lambda line: line["step"] == "plain", memory("training")),
}


def row(what: str, which: Which, sentence: Callable[[list[Line]], str], lines: list[Line]) -> str:
    mine = [line for line in lines if which(line)]
    failed = [line["error"].splitlines()[-1][:100].replace("|", "/") for line in mine if "error" in line]
    said = [part for part in (sentence(mine), f"{len(failed)} failed: {failed[0]}" if failed else "") if part]
    where = dict.fromkeys(f"{line['card']}, {line['date']}" for line in mine if "card" in line) if said else ()
    return f"| {what} | {'; '.join(said) or NOTHING} | {'; '.join(where)} |"


def table(lines: list[Line]) -> str:
    head = ["| on a real card | measured | card, date |", "|---|---|---|"]
    return "\n".join([*head, *(row(what, *how, lines) for what, how in ROWS.items())])


def with_table(readme: str, lines: list[Line]) -> str:
    """`readme` with the table between its two comments."""
    return re.sub(f"{BEGIN}.*?{END}", lambda _: f"{BEGIN}\n{table(lines)}\n{END}", readme, flags=re.DOTALL)


def main() -> int:
    before = README.read_text(encoding="utf-8")
    if BEGIN not in before or END not in before:
        print(f"{README.name} has no {BEGIN} and {END} for the table to stand between")
        return 1
    README.write_text(with_table(before, read()), encoding="utf-8")
    print(table(read()))
    return 0


if __name__ == "__main__":
    sys.exit(main())

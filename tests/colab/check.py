"""The kit on Colab's own versions: the quickstart as Colab would run it, what that changed, then the tests that depend on versions.

    make test-colab                               # a fresh environment with pins.txt in .venv-colab (make_environment.py), then this
    .venv-colab/bin/python -m tests.colab.check --steps 6 --letters 6

Needs a fresh environment with `pins.txt` installed (it has the old torchao that Colab ships). Exit status 0 if

1. the quickstart, alone in an empty folder with Colab's package imported, fetches the kit, installs what is missing and runs to its end;
2. that added only what we add and removed only torchao, and running the first cell again changes nothing;
3. what TRL and bitsandbytes ask for and Colab lacks is the list below, and the test beside each passes;
4. the tests of training, data, panel and keywords, of planning for cards, and the rehearsals of cards pass there.

The quickstart's own text is executed; only its budget is smaller: `--steps` optimizer steps and `--evaluations` instead of those in its
config cell, and `--letters` letters compared instead of 48. The whole one is what `make quickstart` runs on newer versions.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import nbformat
from packaging.requirements import Requirement

from tests.colab.colab_machine import ColabMachine

ROOT = Path(__file__).parents[2]
ADDED, REMOVED = {"trl", "bitsandbytes", "gguf", "rapidfuzz"}, {"torchao"}
# What the added packages ask for and Colab does not have, and the test that shows on these very versions that it does no harm.
UNMET = {
    "trl: datasets>=4.7.0": "tests/test_unmet.py::test_trl_prepares_trains_and_evaluates_on_this_datasets",
    "trl: pyarrow>=21.0.0": "tests/test_unmet.py::test_trl_and_the_reader_work_on_this_pyarrow",
}
# What plans for cards, by the kernels of each kind: what torch and TRL do there differs by version. Also for `newest.py`.
PLANS = [
    "tests/test_planner.py::test_every_kind_of_card_gets_an_exact_plan",
    *(
        f"tests/test_dryrun.py::test_{name}"
        for name in (
            "the_peak_without_weights_equals_the_peak_of_the_real_step[no checkpointing]",
            "the_peak_without_weights_equals_the_peak_of_the_real_step[padded, no checkpointing]",
            "more_tokens_more_memory_less_checkpointing_more_memory",
            "a_small_tile_helps_where_there_is_no_triton",
            "evaluation_and_generation_can_be_measured_too",
            "a_padded_batch_needs_its_mask_and_repeated_keys",
            "segments_are_counted_as_they_will_be_used",
            "attentions_work_is_what_torch_counts_and_does_not_depend_on_shared_keys",
            "a_worker_whose_trl_lacks_a_name_says_which",
        )
    ),
]
# What depends on versions of what runs on a card, on a CPU: every kind of step that plans may choose, interruptions, the lessons' loops. The
# rest of tests/rehearsal (the GPU benchmark, a T4's thirty steps) takes minutes and runs in `make test`.
REHEARSALS = [
    "tests/rehearsal/test_combinations.py::test_what_a_plan_may_choose_trains_and_evaluates",
    "tests/rehearsal/test_interrupted.py",
    "tests/rehearsal/test_lessons_on_a_card.py",
]
TESTS = [
    "test_keywords.py",
    "test_training.py",
    "test_trainer.py",
    "test_guards.py",
    "test_models.py",
    "test_tokens.py",
    "test_compat.py",
    "test_live.py",
    "test_weights.py",
    "test_hub.py",
    "test_hosted.py",
    "test_panel.py",
]
IN_PROCESSES = ["--numprocesses", "auto", "--maxprocesses", "4"]  # as `make test-fast` does
COLD_START, TOTAL, NOISE = 120, 900, 1.5  # seconds; a time fails only above one and a half times its bar


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps of the quickstart (default: 6)")
    parser.add_argument(
        "--evaluations",
        type=int,
        default=2,
        help="times that it measures the validation loss besides the start (default: 2)",
    )
    parser.add_argument("--letters", type=int, default=6, help="letters that it compares before and after (default: 6)")
    parser.add_argument(
        "--only-tests", action="store_true", help="leave the quickstart out, in an environment that has had it"
    )
    chosen = parser.parse_args()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="colab-") as scratch:
        machine = ColabMachine(ROOT, Path(scratch))
        wrong = [] if chosen.only_tests else quickstart(machine, chosen.steps, chosen.evaluations, chosen.letters)
        wrong += unmet_requirements()
        tests = [*UNMET.values(), *(f"tests/{name}" for name in TESTS), *PLANS, *REHEARSALS]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", *IN_PROCESSES, *tests],
            cwd=ROOT,
            env=os.environ | {"HF_HOME": str(machine.cache)},
        )
        wrong += ["tests failed"] if done.returncode else []
    seconds = time.perf_counter() - began + (0 if chosen.only_tests else seconds_of_installing(began))
    print(f"\nall in all {seconds / 60:.1f} of {TOTAL / 60:.0f} minutes")
    wrong += [f"this took {seconds:.0f} s"] if seconds > TOTAL * NOISE else []
    for problem in wrong:
        print(f"FAILED: {problem}")
    return bool(wrong)


def quickstart(machine: ColabMachine, steps: int, evaluations: int, letters: int) -> list[str]:
    """Run it in an empty folder; problems, in words."""
    machine.publish()
    machine.download_beforehand()
    notebook = machine.open_notebook("00_quickstart.ipynb")
    lower_budget(notebook, steps, evaluations, letters)
    before = frozen()
    executed = machine.execute(notebook, first_step_in="runs/quickstart/history.jsonl")
    after = frozen()
    seconds, _ = machine.run_first_cell(notebook)
    again = frozen()

    wrong = [] if executed.returncode == 0 else ["the quickstart failed"]
    added, removed = ({line.partition("==")[0].lower() for line in lines} for lines in (after - before, before - after))
    print(
        f"\nthe first cell added {sorted(added)} and removed {sorted(removed)}; run again: {seconds:.0f} s, changed {sorted(again ^ after)}"
    )
    if (added, removed) != (ADDED, REMOVED) or again != after:
        wrong.append(
            f"the first cell should add {sorted(ADDED)} and remove {sorted(REMOVED)}, once, in a fresh environment"
        )
    if executed.first_step is None:
        wrong.append("no training step was seen")
    else:
        print(
            f"cold start: {executed.first_step:.0f} of {COLD_START} s from the first cell to the first training step, after downloads"
        )
        wrong += ["the cold start is too slow"] if executed.first_step > COLD_START * NOISE else []
    return wrong


def lower_budget(notebook: nbformat.NotebookNode, steps: int = 6, evaluations: int = 2, letters: int = 6) -> None:
    """Less to do, where the notebook names it. Raises ValueError if it does not any more."""
    budgets = {
        r"(config\.max_steps = [^,\n]+, )\d+": steps,
        r"(config\.num_evaluations = \d+, \d+, )\d+": evaluations,
        r"(min\()48(?=, )": letters,
    }
    for pattern, number in budgets.items():
        changed = 0
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.source, count = re.subn(pattern, rf"\g<1>{number}", cell.source)
                changed += count
        if changed != 1:
            raise ValueError(f"{pattern} should be in the notebook once, and is there {changed} times")


def unmet_requirements() -> list[str]:
    found = set.union(*map(unmet, ADDED))
    print(f"asked for and not there: {sorted(found)}")
    return [] if found == set(UNMET) else [f"expected to be unmet: {sorted(UNMET)}"]


def unmet(package: str) -> set[str]:
    """The package's own requirements (no extras) that this environment does not satisfy."""
    found = set()
    for text in requires(package) or []:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            met = requirement.specifier.contains(version(requirement.name), prereleases=True)
        except PackageNotFoundError:
            met = False
        if not met:
            found.add(f"{package}: {requirement.name}{requirement.specifier}")
    return found


def frozen() -> set[str]:
    command = [sys.executable, "-m", "pip", "freeze", "--disable-pip-version-check"]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


def seconds_of_installing(began: float) -> float:
    """From the making of this environment to `began`, a time of `perf_counter`."""
    made = (Path(sys.prefix) / "pyvenv.cfg").stat().st_mtime
    return max(0.0, time.time() - made - (time.perf_counter() - began))


if __name__ == "__main__":
    sys.exit(main())

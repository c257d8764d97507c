"""Execute the lessons and their solutions from top to bottom, and say what each took.

    python -m tools.run_course                       # or: make notebooks; into runs/notebooks/NAME/
    python -m tools.run_course --jobs 1              # one after the other, on all cores
    python -m tools.run_course 02_attach_lora        # only these

Two at a time by default, each with one thread on a core of its own. Notebooks 04, 05 and 06 share the run `runs/course` (the first
that needs it trains it), so those and their solutions go one after the other. Exit status 1 if a cell fails, if a check of a
solution does not say Right, if memory is above its bar, or if the whole takes more than one and a half times its bar. The
quickstart is not among them: `make quickstart` runs it; here its line is shown if there is one.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import nbformat
import psutil

from tools import course

MINUTES, NOISE = 20, 1.5
PEAK_GIB, PEAK_GIB_OF_SEVERAL_PROCESSES = 4.0, 6.0
TRAINS_IN_PROCESSES = ("04", "07")  # beside the notebook's own: one that is killed, and two that share their steps
COLORS = re.compile(r"\x1b\[[\d;]*m")  # tracebacks come in colors
SHARING = ("04", "05", "06")  # they find each other's run


@dataclass(frozen=True)
class Result:
    """What one notebook did. `problem` is empty if all went well."""

    name: str
    seconds: float
    peak_gib: float | None
    problem: str = ""


def name_of(path: Path) -> str:
    return f"solutions_{path.stem}" if path.parent.name == "solutions" else path.stem


def wrong_checks(executed: nbformat.NotebookNode) -> list[str]:
    """The checks of an executed solutions notebook that did not say Right: which, and what they said instead."""
    wrong, known, checks = [], set(), 0
    for cell in course.code_cells(executed):
        tree = ast.parse(cell.source)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(course.CHECKS):
                known |= {alias.asname or alias.name for alias in node.names if alias.name.startswith("check")}
        calls = [
            node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        ]
        called = [name for name in calls if name in known]
        checks += len(called)
        said = "".join(
            output.text for output in cell.outputs if output.output_type == "stream" and output.name == "stdout"
        )
        if sum(line.startswith("Right") for line in said.splitlines()) < len(called):
            wrong.append(f"{', '.join(called)} said {said.strip()[:200]!r}")
    return wrong if checks else ["no check is called"]


def execute(path: Path, into: Path, core: int | None, threads: int) -> Result:
    """Run one notebook in a process of its own, pinned to `core` (None: any), and look at what it left behind."""
    into.mkdir(parents=True, exist_ok=True)
    counts = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    command = [sys.executable, "-m", "tools.run_notebook", str(path), "--into", str(into)]
    started = time.monotonic()
    with (into / "log.txt").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=course.ROOT,
            env=os.environ | counts | {"TOKENIZERS_PARALLELISM": "false"},
        )
        try:
            if core is not None and hasattr(psutil.Process, "cpu_affinity"):  # macOS does not let processes be pinned
                psutil.Process(process.pid).cpu_affinity([core])  # the notebook's kernel starts later, and inherits it
            failed = process.wait() != 0
        finally:
            process.kill()
    if failed:
        said = COLORS.sub("", (into / "log.txt").read_text(encoding="utf-8", errors="replace"))
        tail = said.strip().splitlines()[-1:]
        return Result(
            name_of(path),
            time.monotonic() - started,
            None,
            f"{tail[0][:200] if tail else 'failed'} (see {into / 'log.txt'})",
        )
    measured = json.loads((into / "executions.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    problems = wrong_checks(course.read(into / "executed.ipynb")) if path.parent.name == "solutions" else []
    peak, bar = (
        measured["peak_memory_gib"],
        PEAK_GIB_OF_SEVERAL_PROCESSES if path.name.startswith(TRAINS_IN_PROCESSES) else PEAK_GIB,
    )
    if peak > bar:
        problems.append(f"{peak} GiB is more than {bar}")
    return Result(name_of(path), measured["seconds"], peak, "; ".join(problems))


def run_all(paths: list[Path], into: Path, jobs: int) -> list[Result]:
    """Execute all notebooks, `jobs` at a time; those that share a run never at the same time, and in their order."""
    shared = [path for path in paths if path.name.startswith(SHARING)]
    others = [path for path in paths if path not in shared]
    cores = sorted(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else []
    results: dict[Path, Result] = {}
    lock, sharing = threading.Lock(), threading.Lock()

    def take() -> tuple[Path | None, bool]:
        """The next notebook, and whether it is one of those that share a run. The sharing ones first: they are the longer queue."""
        with lock:
            if shared and sharing.acquire(blocking=False):
                return shared.pop(0), True
            return (others.pop(0), False) if others else (None, False)

    def work(number: int) -> None:
        pinned = jobs > 1 and len(cores) >= jobs
        while True:
            path, is_sharing = take()
            if path is None:
                if not shared:
                    return
                time.sleep(0.2)  # what is left waits for the one that another job executes
                continue
            try:
                result = execute(
                    path,
                    into / name_of(path),
                    cores[number] if pinned else None,
                    1 if jobs > 1 else os.cpu_count() or 1,
                )
            finally:
                if is_sharing:
                    sharing.release()
            results[path] = result
            print(row(result), flush=True)

    threads = [threading.Thread(target=work, args=[number]) for number in range(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results[path] for path in paths]


def row(result: Result) -> str:
    peak = f"{result.peak_gib:.1f}" if result.peak_gib else "-"
    return f"{result.name:<34}{result.seconds:8.0f} s{peak:>8} GiB  {result.problem}".rstrip()


def quickstart() -> Result | None:
    """What `make quickstart` measured, if it has run."""
    file = course.ROOT / "runs" / "quickstart" / "executions.jsonl"
    if not file.is_file():
        return None
    first = json.loads(file.read_text(encoding="utf-8").splitlines()[0])  # later ones find the finished run
    return Result("(00_quickstart, by make quickstart)", first["seconds"], first["peak_memory_gib"])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="only these notebooks: 02_attach_lora, solutions_02_attach_lora, ...")
    parser.add_argument(
        "--jobs", type=int, default=2, help="how many at a time; 1: each on all cores (default: 2, one core each)"
    )
    parser.add_argument("--into", type=Path, default=course.ROOT / "runs" / "notebooks")
    chosen = parser.parse_args(arguments)
    paths = [path for path in [*course.lessons(), *course.solutions()] if not path.name.startswith("00_")]
    unknown = set(chosen.names) - {name_of(path) for path in paths}
    if unknown:
        parser.error(f"no such notebook: {', '.join(sorted(unknown))}; there are {', '.join(map(name_of, paths))}")
    paths = [path for path in paths if not chosen.names or name_of(path) in chosen.names]

    found = sorted(file.parent.name for file in (course.ROOT / "runs").glob("*/run.json"))
    if found:
        print(
            f"Runs that are there already will be found instead of trained, which takes less time: {', '.join(found)}"
        )
    started = time.monotonic()
    results = run_all(paths, chosen.into.resolve(), max(chosen.jobs, 1))
    minutes = (time.monotonic() - started) / 60
    print("\n" + "\n".join(row(result) for result in [*filter(None, [quickstart()]), *results]))
    print(f"{len(results)} notebooks, {chosen.jobs} at a time: {minutes:.1f} of {MINUTES} minutes")
    chosen.into.mkdir(parents=True, exist_ok=True)
    record = {"minutes": round(minutes, 1), "jobs": chosen.jobs, "notebooks": [asdict(result) for result in results]}
    (chosen.into / "course.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    failed = [result.name for result in results if result.problem]
    if failed:
        print(f"Not as they should be: {', '.join(failed)}")
    return 1 if failed or minutes > MINUTES * NOISE else 0


if __name__ == "__main__":
    sys.exit(main())

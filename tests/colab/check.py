"""The kit on Colab's own versions: run the first cell's second half as Colab would, look at what changed, then test training.

    make test-colab

Runs inside an environment with `pins.txt` installed (which has the old torchao that Colab ships). Exit status 0 if only what we add was
added, only torchao went, the unmet requirements are the known ones, and the tests of training pass there.
"""

from __future__ import annotations

import subprocess
import sys
import time
import types
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
ADDED, REMOVED = {"trl", "bitsandbytes", "gguf", "rapidfuzz"}, {"torchao"}
# What TRL and bitsandbytes ask for and Colab does not have. Harmless: the tests below train, evaluate and save on these very versions.
UNMET = {"trl: datasets>=4.7.0", "trl: pyarrow>=21.0.0"}
TESTS = [
    "test_training.py",
    "test_trainer.py",
    "test_guards.py",
    "test_models.py",
    "test_tokens.py",
    "test_loss_head.py",
    "test_live.py",
]


def frozen() -> set[str]:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "freeze", "--disable-pip-version-check"], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


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


def main() -> int:
    before = frozen()
    sys.modules["google.colab"] = types.ModuleType("google.colab")
    sys.path.insert(0, str(ROOT))
    from helpers.bootstrap import install_what_is_missing

    started = time.perf_counter()
    for _ in range(2):
        install_what_is_missing()
    seconds = time.perf_counter() - started
    after = frozen()
    added, removed = ({line.partition("==")[0] for line in lines} for lines in (after - before, before - after))
    still_unmet = set.union(*map(unmet, ADDED))
    print(f"bootstrap, twice: {seconds:.0f} s; added {sorted(added)}, removed {sorted(removed)}; unmet: {sorted(still_unmet)}")
    if (added, removed) not in ((ADDED, REMOVED), (set(), set())) or still_unmet != UNMET:
        print(f"expected: added {sorted(ADDED)}, removed {sorted(REMOVED)} (or nothing, the second time); unmet {sorted(UNMET)}")
        return 1
    tests = [str(ROOT / "tests" / name) for name in TESTS]
    return subprocess.run([sys.executable, "-m", "pytest", "-q", *tests], cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())

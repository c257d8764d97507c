"""The checks of the notebooks' text need no torch and no time, so they can run on every push, before anything heavy is installed."""

import subprocess
import sys
import time

import pytest

BAR, NOISE = 30, 1.5  # seconds
STATIC = ["tests/test_notebooks.py", "tests/test_portable.py", "tests/test_python_version.py"]
HEAVY = ["torch", "transformers", "peft", "trl", "bitsandbytes", "datasets"]


@pytest.mark.slow
def test_the_static_checks_pass_without_torch_in_half_a_minute(root, tmp_path, say):
    blocked = "".join(f"sys.modules[{name!r}] = None\n" for name in HEAVY)  # an import of it raises ImportError
    (tmp_path / "without_torch.py").write_text("import sys\n" + blocked, encoding="utf-8")
    command = [
        sys.executable,
        "-c",
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import without_torch, pytest; "
        f"sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', *{STATIC!r}]))",
    ]
    began = time.perf_counter()
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    seconds = time.perf_counter() - began
    say(f"static checks: {seconds:.1f} of {BAR} s")
    assert done.returncode == 0, done.stdout[-3000:]
    assert seconds < BAR * NOISE

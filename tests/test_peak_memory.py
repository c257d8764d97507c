"""The memory of what a command starts, all of it together."""

import subprocess
import sys

MIB = 2**20
HOLD = "import time; block = bytearray(150 * 2**20); block[::4096] = b'x' * len(block[::4096]); time.sleep({seconds})"
MEASURE = f"""
import subprocess, sys
from tools.peak_memory import PeakOfChildren
with PeakOfChildren() as peak:
    for child in [subprocess.Popen([sys.executable, "-c", {HOLD!r}.format(seconds=sys.argv[2])]) for _ in range(int(sys.argv[1]))]:
        child.wait()
print(peak.gib * 2**30)
"""


def measured(root, children, seconds):
    """In a process of its own, because the one that tests has other children."""
    command = [sys.executable, "-c", MEASURE, str(children), str(seconds)]
    return float(subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout)


def test_two_children_at_once_count_together(root):
    assert 300 * MIB <= measured(root, children=2, seconds=3) < 400 * MIB


def test_one_that_is_gone_before_anybody_looks_counts_too(root):
    if sys.platform != "win32":
        assert measured(root, children=1, seconds=0) >= 150 * MIB

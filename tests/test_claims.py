"""The claims page is what its command prints, and its sentences agree with its numbers."""

import re

import pytest

from benchmarks import claims
from benchmarks.claims import BATCHES, GB, LADDER, SEVEN, more_work, saving, shape
from helpers.hardware import GIB
from helpers.memory import estimate


def test_the_page_is_what_the_command_prints():
    assert claims.PAGE.read_text(encoding="utf-8") == claims.page(), "python -m benchmarks.claims --write"


def test_every_claim_of_the_specification_is_there():
    quoted = " ".join(claim.quoted for claim in claims.claims())
    for number in ("28 GB", "80 GB", "16 GB", "10 GB", "quarter", "60 %", "20 %", "1 %", "2 to 3 epochs", "50 lines"):
        assert number in quoted


def test_the_verdicts_on_memory_hold():
    for name in SEVEN:
        assert 4 * shape(name).parameters() > 28 * GB
        assert 8 * shape(name).parameters() < 80 * GB < 16 * shape(name).parameters()
        assert estimate(shape(name), 1, 512).total_bytes < 10 * GIB
    sizes = [estimate(shape(name), 1, 512, quantization="none").total_bytes for name in SEVEN]
    assert sum(size < 16 * GB for size in sizes) == 1
    thirteen = shape(claims.THIRTEEN)
    assert estimate(thirteen, 1, 512).total_bytes < 10 * GB < estimate(thirteen, 4, 512).total_bytes * 1.1
    assert estimate(thirteen, 1, 2048, **claims.USUAL).total_bytes > 10 * GB


def test_the_verdicts_on_shares_hold():
    ratios = [claims.whole_model_ratio(shape(name)) for name in LADDER]
    assert ratios == sorted(ratios, reverse=True) and min(ratios) > 0.25  # small models shrink least
    trainable = [shape(name).lora_parameters(16) / shape(name).parameters() for name in LADDER]
    assert trainable == sorted(trainable, reverse=True) and trainable[0] > 0.03 and trainable[2] < 0.01
    for name in LADDER:
        savings = [saving(shape(name), *batch) for batch in BATCHES]
        assert savings == sorted(savings, reverse=True) and savings[0] > -0.6 > savings[-1]  # it grows with the tokens
        assert all(0.2 < more_work(shape(name), *batch) < 0.5 for batch in BATCHES)


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ('"""Doc\n\nof two."""\n\nimport os  # here\n# not\n\n\ndef f():\n    """Doc."""\n    return os\n', 3),
        ("x = '''a\n\nb'''\n", 2),
    ],
)
def test_lines_of_code_are_counted_without_comments_and_docstrings(source, lines):
    assert claims.code_lines(source) == lines


def test_the_page_is_plain_markdown():
    text = claims.PAGE.read_text(encoding="utf-8")
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({line.count("|") for line in table.splitlines()}) == 1
    assert "nan" not in text and "{" not in text

"""The checks of lesson 01 tell right from wrong, say what to look at, and never raise."""

from statistics import NormalDist

import pytest

from helpers.memory import nf4_bytes
from helpers.registry import CATALOG
from notebooks.lessons.lesson_01 import check_bits_per_weight, check_codebook, check_nf4_size

SHAPE = CATALOG["Llama-3.1-8B-Instruct"].shape
LINEARS, REST = SHAPE.linear_parameters(), SHAPE.other_parameters()


def bits_per_weight(block, double):
    return 4 + (8 + 32 / 256 if double else 32) / block


def codebook(above=8, below=7, last=0.9677083):
    quantile = NormalDist().inv_cdf
    up = [quantile(0.5 + (last - 0.5) * step / above) for step in range(above + 1)]
    down = [-quantile(0.5 + (last - 0.5) * step / below) for step in range(1, below + 1)]
    return [level / up[-1] for level in sorted(down + up)]


@pytest.mark.parametrize("check", [check_nf4_size, check_bits_per_weight, check_codebook])
def test_a_missing_answer_is_the_readers_turn(said, check):
    assert said(check, None).startswith("Your turn")


@pytest.mark.parametrize("check", [check_nf4_size, check_bits_per_weight, check_codebook])
@pytest.mark.parametrize(
    "answer", ["5", float("nan"), [], {}, True, object(), lambda: 1 / 0, lambda *_: "x", [None] * 16, ["a"] * 16]
)
def test_an_absurd_answer_is_not_right_and_does_not_raise(said, check, answer):
    assert said(check, answer).startswith("Not yet")


def test_the_size_in_nf4(said):
    assert said(check_nf4_size, (nf4_bytes(LINEARS) + 2 * REST) / 2**30).startswith("Right")


@pytest.mark.parametrize(
    ("gib", "hint"),
    [
        ((nf4_bytes(LINEARS) + 2 * REST) / 1e9, "GB"),
        (nf4_bytes(LINEARS) + 2 * REST, "bytes"),
        ((LINEARS + REST) * 2 / 2**30, "16 bit"),
        ((LINEARS + REST) / 2 / 2**30, "not everything"),
        (nf4_bytes(LINEARS + REST) / 2**30, "not everything"),
        (nf4_bytes(LINEARS) / 2**30, "not the whole model"),
        ((LINEARS / 2 + 2 * REST) / 2**30, "scale"),
        ((nf4_bytes(LINEARS, double_quant=False) + 2 * REST) / 2**30, "without double"),
        ((nf4_bytes(LINEARS) + 4 * REST) / 2**30, "two bytes"),
        (1234.5, "two parts"),
    ],
)
def test_a_wrong_size_gets_the_hint_that_fits(said, gib, hint):
    line = said(check_nf4_size, gib)
    assert line.startswith("Not yet") and hint in line


def test_the_bits_of_a_weight(said):
    assert said(check_bits_per_weight, bits_per_weight).startswith("Right")


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda block, double: 4, "Where does the scale go"),
        (lambda block, double: 4 + (1 if double else 4) / block, "bits, not bytes"),
        (lambda block, double: 4 + (8 if double else 32) / block, "256 scales"),
        (lambda block, double: 4 + 32 / block, "still in 32"),
        (lambda block, double: 4 + 16 / block, "not 16"),
        (lambda block, double: 4.127, "divide that"),
        (lambda block: 4, "TypeError"),
        (lambda block, double: block / 0, "ZeroDivisionError"),
    ],
)
def test_a_wrong_function_gets_the_hint_that_fits(said, answer, hint):
    line = said(check_bits_per_weight, answer)
    assert line.startswith("Not yet") and hint in line


def test_the_codebook_is_the_librarys(said):
    assert said(check_codebook, codebook()).startswith("Right")


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (codebook()[:15], "has 15"),
        (codebook()[::-1], "must rise"),
        ([*codebook()[:-1], float("inf")], "infinite"),
        ([level * 1.8 for level in codebook()], "outermost"),
        ([-level for level in reversed(codebook())], "other side"),
        ([-1 + 2 * step / 15 for step in range(16)], "exactly 0"),
        ([step / 8 - 1 for step in range(17) if step != 1], "count"),
        (codebook(last=0.99), "places"),
    ],
)
def test_a_wrong_codebook_gets_the_hint_that_fits(said, answer, hint):
    line = said(check_codebook, answer)
    assert line.startswith("Not yet") and hint in line

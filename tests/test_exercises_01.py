"""The checks of lesson 01 tell right from wrong, say what to look at, and never raise."""

from statistics import NormalDist

from helpers.memory import nf4_bytes
from helpers.registry import CATALOG
from notebooks.lessons.lesson_01 import check_bits_per_weight, check_codebook, check_nf4_size
from tests.exercises import answers

SHAPE = CATALOG["Llama-3.1-8B-Instruct"].shape
LINEARS, REST = SHAPE.linear_parameters(), SHAPE.other_parameters()
WANTED = nf4_bytes(LINEARS) + 2 * REST


def bits(scale, double_scale):
    return lambda block, double: 4 + (double_scale if double else scale) / block


def codebook(above=8, below=7, last=0.9677083):
    quantile = NormalDist().inv_cdf
    up = [quantile(0.5 + (last - 0.5) * step / above) for step in range(above + 1)]
    down = [-quantile(0.5 + (last - 0.5) * step / below) for step in range(1, below + 1)]
    return [level / up[-1] for level in sorted(down + up)]


@answers(
    {
        check_nf4_size: [
            (WANTED / 2**30, "Right"),
            (WANTED / 1e9, "GB"),
            (WANTED, "bytes"),
            ((LINEARS + REST) * 2 / 2**30, "16 bit"),
            ((LINEARS + REST) / 2 / 2**30, "not everything"),
            (nf4_bytes(LINEARS + REST) / 2**30, "not everything"),
            (nf4_bytes(LINEARS) / 2**30, "not the whole model"),
            ((LINEARS / 2 + 2 * REST) / 2**30, "scale"),
            ((nf4_bytes(LINEARS, double_quant=False) + 2 * REST) / 2**30, "without double"),
            ((nf4_bytes(LINEARS) + 4 * REST) / 2**30, "two bytes"),
            (1234.5, "two parts"),
        ],
        check_bits_per_weight: [
            (bits(32, 8 + 32 / 256), "Right"),
            (lambda block, double: round(4 + (8 + 32 / 256 if double else 32) / block, 3), "Right"),
            (bits(0, 0), "Where does the scale go"),
            (bits(4, 1), "bits, not bytes"),
            (bits(32, 8), "256 scales"),
            (bits(32, 32), "still in 32"),
            (bits(16, 8 + 32 / 256), "not 16"),
            (lambda block, double: 4.5, "the same for each size of block"),
            (lambda block, double: 4.127 if double else 4.5, "without double quantization: the same for each"),
            (lambda block, double: 4.127, "the same for each size of block"),
            (lambda block, double: 4 + (8 + 32 / 256 if double else 32) * block, "a share in what its block keeps"),
            (lambda block: 4, "TypeError"),
            (lambda block, double: block / 0, "ZeroDivisionError"),
        ],
        check_codebook: [
            (codebook(), "Right"),
            (codebook()[:15], "has 15"),
            (codebook()[::-1], "must rise"),
            ([*codebook()[:-1], float("inf")], "infinite"),
            ([level * 1.8 for level in codebook()], "outermost"),
            ([-level for level in reversed(codebook())], "other side"),
            ([-1 + 2 * step / 15 for step in range(16)], "exactly 0"),
            ([step / 8 - 1 for step in range(17) if step != 1], "count"),
            (codebook(last=0.99), "places"),
        ],
    }
)
def test_answers(said, check, answer, words):
    said(check, answer, words)

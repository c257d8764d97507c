"""Score functions: an answer, and mostly the reference, become a number between 0 and 1. Yours may do the same.

def is_short(answer): return len(answer.split()) < 50
table = compare_before_after(model, tokenizer, validation, score=is_short)
"""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterable

Score = Callable[..., float]
# The five lines that every answer of the fictional shop in data_samples/customer_support.jsonl has.
HOUSE_STYLE = re.compile(
    r"Hello \S+,\n"
    r"I hear you: .+\n"
    r"We will: .+\n"
    r"You can: .+\n"
    r"Warmly, Wren at Copperleaf"
)


def follows_house_style(answer: str) -> bool:
    """Does the whole answer have the five lines of Copperleaf's house style, in order and with nothing around them?"""
    return HOUSE_STYLE.fullmatch(answer) is not None


def exact_match(answer: str, reference: str) -> bool:
    """Is it the reference, but for spaces and line ends?"""
    return answer.split() == reference.split()


def rouge_l(answer: str, reference: str) -> float:
    """ROUGE-L: how long the longest common subsequence of words is, as F1 (Lin 2004). Words in the same order count, gaps do not.

    Raises:
        ImportError: rapidfuzz is not installed; says how to get it.
    """
    try:
        from rapidfuzz.distance import LCSseq
    except ImportError:
        raise ImportError(
            "ROUGE-L needs the package rapidfuzz: %pip install rapidfuzz (2 MB), or use token_f1."
        ) from None
    given, wanted = words(answer), words(reference)
    return _f1(LCSseq.similarity(given, wanted), len(given), len(wanted))


def token_f1(answer: str, reference: str) -> float:
    """F1 of the words, in any order: what share of the answer's words is in the reference, and the other way round."""
    given, wanted = words(answer), words(reference)
    return _f1((Counter(given) & Counter(wanted)).total(), len(given), len(wanted))


def words(text: str) -> list[str]:
    """Lower-case words and numbers of any alphabet, without punctuation."""
    return re.findall(r"\w+", text.lower())


def _f1(common: float, given: int, wanted: int) -> float:
    """The harmonic mean of common / given and common / wanted."""
    return 2 * common / (given + wanted) if given + wanted else 1.0


def scored(score: Score, answers: Iterable[str], references: Iterable[str]) -> list[float]:
    """`score` of each answer, given the reference too if it takes two arguments."""
    needs_reference = len(_positional(score)) > 1
    return [
        float(score(answer, reference) if needs_reference else score(answer))
        for answer, reference in zip(answers, references)
    ]


def _positional(score: Score) -> list[str]:
    """The arguments that have no default."""
    try:
        parameters = inspect.signature(score).parameters.values()
    except ValueError:  # some built-in functions do not tell
        return ["answer"]
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [
        parameter.name for parameter in parameters if parameter.kind in plain and parameter.default is parameter.empty
    ]

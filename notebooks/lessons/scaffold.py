"""What every lesson needs: a frame for the checks of its exercises, precision for its own loops, and a style for its charts.

    @exercise("a number of GiB", number)
    def check_size(answer, ...):
        must_be(answer, wanted, [(2**30 * wanted, "that is in bytes.")], "what stays in 16 bit?")
        return "Right: ..."

A check prints one line that begins with Right, Not yet or Your turn. It never raises, whatever a learner hands over.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from itertools import takewhile
from typing import Any

import torch
from matplotlib import rc_context
from matplotlib.axes import Axes

from helpers.plots import MUTED, STYLE

# A power of two changes no digit. Trainers look for the largest that does not overflow, these loops need not.
LOSS_SCALE = 1024
Kind = Callable[[Any], Any]


class NotYet(Exception):
    """The answer is wrong; the message says what to look at."""

    @classmethod
    def because(cls, *cases: tuple[Any, str], otherwise: str) -> NotYet:
        """With the hint of the first case that is true."""
        return cls(next((hint for is_so, hint in cases if is_so), otherwise))


def pair(answer: Any) -> tuple[float, float]:
    """Two numbers."""
    one, other = answer
    return float(one), float(other)


def tensor(answer: Any) -> torch.Tensor:
    """A number, or numbers in any arrangement."""
    return torch.as_tensor(answer, dtype=torch.float64, device="cpu").detach()


def only(is_so: Callable[[Any], bool]) -> Kind:
    """What is so, as it is; anything else raises."""

    def kind(answer: Any) -> Any:
        if not is_so(answer):
            raise TypeError
        return answer

    return kind


number = only(lambda answer: not isinstance(answer, bool) and math.isfinite(answer))
text = only(lambda answer: isinstance(answer, str))
function = only(callable)


def exercise(wanted: str = "the function itself, without brackets", kind: Kind = function) -> Callable[..., Any]:
    """Turn a function that returns "Right ..." or raises `NotYet` into a check that prints one line.

    `kind` makes of the answer what the function needs, and raises if it cannot; then the learner reads what is `wanted`.
    """

    def decorate(check: Callable[..., str]) -> Callable[..., None]:
        @wraps(check)
        def checked(answer: Any, *arguments: Any, **named: Any) -> None:
            if answer is None:
                return print(f"Your turn: the answer is {wanted}.")
            try:
                answer = kind(answer)
            except Exception:
                return print(f"Not yet: the answer is {wanted}.")
            try:
                print(check(answer, *arguments, **named))
            except NotYet as hint:
                print(f"Not yet: {hint}")

        return checked

    return decorate


def attempt(answer: Callable[..., Any], *arguments: Any, kind: Kind, where: str = "") -> Any:
    """What a learner's function returns, made into a `kind`. It may do anything; `where` begins the sentence about it."""
    try:
        returned = answer(*arguments)
    except Exception as error:
        said = (str(error).splitlines() or ["no message"])[0]
        raise NotYet(f"{where}your function raises {type(error).__name__}: {said:.90}.") from None
    try:
        return kind(returned)
    except Exception:
        raise NotYet(f"{where}your function returns {returned!r:.60}, which is nothing of the right kind.") from None


def alike(one: Any, other: Any, within: float = 1e-4) -> bool:
    """Numbers or tensors that differ by no more than the share `within`; nan is like nan."""
    one, other = tensor(one), tensor(other)
    return one.shape == other.shape and torch.allclose(one, other, rtol=within, atol=1e-5, equal_nan=True)


def must_be(given: Any, wanted: Any, slips: Sequence[tuple[Any, str]], otherwise: str, within: float = 1e-4) -> None:
    """Raise `NotYet` unless `given` is like `wanted`, up to the share `within`.

    Slips are (what a usual mistake gives, its hint): the first that `given` is like gives its hint, else it is `otherwise`.
    """
    shape, right_shape = tuple(tensor(given).shape), tuple(tensor(wanted).shape)
    if shape != right_shape:
        raise NotYet(f"the result should have the shape {right_shape}, yours has {shape or 'none: it is one number'}.")
    if not alike(given, wanted, within):
        cases = [(alike(given, slip, within), hint) for slip, hint in slips]
        raise NotYet.because(*cases, otherwise=otherwise)


def must_read(given: str, wanted: str) -> None:
    """Raise `NotYet` unless two texts are the same: with the place up to which they are, and not with how it goes on."""
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(given, wanted)))
    right = f"the first {same} of {len(wanted)} characters are right, up to ...{given[max(0, same - 20) : same]!r}"
    if given != wanted:
        raise NotYet.because(
            (given.strip() == wanted.strip(), "only white space at an end differs. A line break is a token, too."),
            (same == len(given), f"{right}, and there yours ends."),
            (same == len(wanted), f"{right}, and yours goes on after that."),
            otherwise=f"{right}. Look at what comes next, spaces and line breaks too.",
        )


def lora_trials(answer: Callable[..., Any], with_inputs: bool) -> Iterator[tuple[torch.Tensor, tuple[Any, ...]]]:
    """Try a function of (x,) W, A, B, alpha and rank on three shapes: (what it gave, the six). It must leave W alone.

    No W is square, and one alpha / rank is no whole number, so that what works by chance is found out.
    """
    chance = torch.Generator().manual_seed(0)
    for outputs, inputs, rank, alpha in [(6, 4, 2, 8), (3, 7, 1, 1), (5, 8, 3, 16)]:
        shapes = [(2, 3, inputs), (outputs, inputs), (rank, inputs), (outputs, rank)]
        x, weight, a, b = (torch.randn(shape, generator=chance) for shape in shapes)
        handed = [x, weight.clone(), a, b, alpha, rank][not with_inputs :]
        given = attempt(answer, *handed, kind=tensor, where=f"with W {outputs} x {inputs} and rank {rank}, ")
        if not torch.equal(handed[with_inputs], weight):
            raise NotYet("your function changes the W that it was given. W is frozen: return something new.")
        yield given, (x, weight, a, b, alpha, rank)


# ------------------------------------------------------------------------------------------- loops and charts


@contextmanager
def mixed_precision(model: torch.nn.Module) -> Iterator[int]:
    """Calculate as the trainer does with this model's numbers: 16 bits on a card, while the adapter stays in fp32.

    Gives the factor for the loss, by which every gradient is divided before it is used: fp16 would round the smallest ones to zero.
    In fp32 (a CPU) nothing changes, and the factor is 1. Lesson 02 writes it out once.
    """
    with torch.autocast(model.device.type, model.dtype, enabled=model.dtype != torch.float32):
        yield LOSS_SCALE if model.dtype == torch.float16 else 1


# Decorates a function that draws a figure: the kit's style, with thin lines across.
chart = rc_context({"axes.grid": True, "axes.grid.axis": "y", "grid.alpha": 0.25}, fname=STYLE)


def level(axes: Axes, height: float, words: str, color: str = MUTED, ha: str = "right") -> None:
    """A dashed line across, with small words under its right or left end."""
    axes.axhline(height, color=color, linestyle="--", linewidth=1.2)
    looks = {"xycoords": axes.get_yaxis_transform(), "textcoords": "offset points", "color": color, "fontsize": 8.5}
    axes.annotate(words, (ha == "right", height), (0, -4), ha=ha, va="top", **looks)

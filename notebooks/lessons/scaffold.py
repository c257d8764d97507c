"""What every lesson needs: a frame for the checks of its exercises, precision for its own loops, and bare axes for its charts.

    @exercise("a number of GiB", number)
    def check_size(answer, ...):
        if ...:
            raise NotYet("that is in bytes.")
        return "Right: ..."

A check prints one line that begins with Right, Not yet or Your turn. It never raises, whatever a learner hands over.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

LOSS_SCALE = (
    1024  # a power of two changes no digit; trainers look for the largest that does not overflow, these loops need not
)


# ------------------------------------------------------------------------------------------- checks of exercises


class NotYet(Exception):
    """The answer is wrong; the message says what to look at."""

    @classmethod
    def because(cls, *cases: tuple[Any, str], otherwise: str) -> NotYet:
        """With the hint of the first case that is true."""
        return cls(next((hint for is_so, hint in cases if is_so), otherwise))


def number(answer: Any) -> None:
    """A finite number, and not True or False."""
    if isinstance(answer, bool) or not isinstance(answer, int | float) or not math.isfinite(answer):
        raise TypeError


def function(answer: Any) -> None:
    """Something that can be called."""
    if not callable(answer):
        raise TypeError


def anything(answer: Any) -> None:
    """The check looks for itself."""


def exercise(
    wanted: str, kind: Callable[[Any], None] = anything
) -> Callable[[Callable[..., str]], Callable[..., None]]:
    """Turn a function that returns "Right ..." or raises `NotYet` into a check that prints one line.

    Args:
        wanted: what the answer is, for a learner who has given none, or something else.
        kind: raises TypeError if the answer is nothing of that kind.
    """

    def decorate(check: Callable[..., str]) -> Callable[..., None]:
        @wraps(check)
        def checked(answer: Any, *arguments: Any, **named: Any) -> None:
            if answer is None:
                return print(f"Your turn: the answer is {wanted}.")
            try:
                kind(answer)
            except TypeError:
                return print(f"Not yet: the answer is {wanted}.")
            try:
                print(check(answer, *arguments, **named))
            except NotYet as hint:
                print(f"Not yet: {hint}")

        return checked

    return decorate


def attempt(call: Callable[[], Any], where: str = "") -> Any:
    """The result of a learner's code, which may do anything. What it raises becomes `NotYet`; `where` begins the sentence."""
    try:
        return call()
    except NotYet:
        raise
    except Exception as error:
        said = (str(error).splitlines() or ["no message"])[0]
        raise NotYet(f"{where}your function raises {type(error).__name__}: {said:.90}.") from None


def first_difference(given: str, wanted: str) -> int:
    """How many characters of two texts are the same from the beginning."""
    same = (place for place, (one, other) in enumerate(zip(given, wanted)) if one != other)
    return next(same, min(len(given), len(wanted)))


# ------------------------------------------------------------------------------------------- loops and charts


@contextmanager
def mixed_precision(model: PreTrainedModel | PeftModel) -> Iterator[int]:
    """Calculate as the trainer does with this model's numbers: 16 bits on a card, while the adapter stays in fp32.

    Gives the factor for the loss: fp16 would round the smallest gradients to zero. In fp32 (a CPU) nothing changes, and the factor is
    1. Lesson 02 writes it out once:

        with mixed_precision(model) as scale:
            loss = ...
        (scale * loss).backward()                    # and every gradient is divided by `scale` before it is used
    """
    with torch.autocast(model.device.type, model.dtype, enabled=model.dtype != torch.float32):
        yield LOSS_SCALE if model.dtype == torch.float16 else 1


def bare_figure(width: float, height: float) -> Figure:
    """A figure in inches, made without pyplot."""
    return Figure(figsize=(width, height), dpi=110, layout="constrained")


def bare_axes(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure in inches with one chart, without a frame above and on the right."""
    figure = bare_figure(width, height)
    return figure, tidy(figure.add_subplot())


def tidy(axes: Axes, grid: bool = True) -> Axes:
    """No frame above and on the right, thin lines across."""
    axes.spines[["top", "right"]].set_visible(False)
    if grid:
        axes.grid(axis="y", alpha=0.25)
    return axes


def note(axes: Axes, words: str, place: tuple[float, float], shift: tuple[float, float], **looks: Any) -> None:
    """Small words beside `place`, shifted by so many points."""
    axes.annotate(words, place, xytext=shift, textcoords="offset points", **{"fontsize": 8.5} | looks)

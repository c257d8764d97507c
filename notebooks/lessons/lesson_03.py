"""Lesson 03: answers of two files beside each other, and the checks of the exercises.

side_by_side_answers(clean, noisy, rows=5)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from helpers.data.tokens import coverage
from notebooks.lessons.scaffold import NotYet, attempt, exercise, first_difference, function, number

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

QUESTIONS = ["Where is my parcel?", "Can I pay by card?", "The lid is broken", "Do you repair shears?"]
# (validation, positions that leak, what a function that fails here has overlooked)
LEAKS: list[tuple[list[str], list[int], str]] = [
    (["May I come by?", "Can I pay by card?"], [1], "a question that stands in both parts word for word was not found"),
    (["where is my PARCEL?"], [0], "the same question in other capitals is the same question"),
    (["The lid is broken!!", "Do you repair shears"], [0, 1], "with other punctuation it is still the same question"),
    (["  The  lid\nis broken "], [0], "spaces and line breaks do not make another question"),
    (["Where is my card?", "Can I pay?", "broken"], [], "a question that only shares words with another is no leak"),
    (
        ["Do you repair shears?", "Hello", "Do you repair shears?"],
        [0, 2],
        "each leaked question counts, also the second",
    ),
    ([], [], "an empty part has no leaks"),
]


def side_by_side_answers(
    clean: Sequence[dict[str, Any]], noisy: Sequence[dict[str, Any]], rows: int = 5
) -> pd.DataFrame:
    """The first `rows` answers that differ, clean and noisy beside each other, with their lines joined by " / "."""
    pairs = [(_answer(one), _answer(other)) for one, other in zip(clean, noisy)]
    chosen = [pair for pair in pairs if pair[0] != pair[1]][:rows]
    return pd.DataFrame(chosen, columns=["clean answer", "what the noisy file says"])


def _answer(example: dict[str, Any]) -> str:
    return example["completion"][0]["content"].replace("\n", " / ")


@exercise("a number of tokens above zero", number)
def check_max_length(answer: float, token_lengths: Sequence[int], share: float = 0.95, multiple: int = 32) -> str:
    """Easy. `answer`: the smallest multiple of `multiple` that covers at least `share` of the examples."""
    if answer <= 0 or answer % multiple:
        raise NotYet(f"{answer} is no multiple of {multiple} above zero.")
    covered = coverage(token_lengths, int(answer))
    if covered < share:
        raise NotYet(f"{answer} tokens hold {covered:.1%} of the examples whole, which is less than {share:.0%}.")
    if coverage(token_lengths, int(answer) - multiple) >= share:
        raise NotYet(f"{answer} is enough, but so is less; every token of max_length costs memory.")
    longest = max(token_lengths)
    return f"Right: the longest example alone would need {longest}; a few long ones need not decide what all cost."


@exercise("one text with all messages and marks")
def check_template(answer: Any, messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> str:
    """Medium. `answer`: the conversation as text, as the tokenizer's chat template writes it."""
    if not isinstance(answer, str):
        raise NotYet(f"the answer is a text, this is {type(answer).__name__}.")
    wanted = tokenizer.apply_chat_template(messages, tokenize=False)
    if answer == wanted:
        return "Right: these marks are all that tells the model who is speaking and where an answer ends."
    if answer.strip() == wanted.strip():
        raise NotYet("only white space at the beginning or the end differs. To the model a line break is a token.")
    if missing := [message["role"] for message in messages if message["content"] not in answer]:
        raise NotYet(f"the text of the {missing[0]} is not in it, or not word for word.")
    same = first_difference(answer, wanted)
    there = answer[max(0, same - 20) : same]
    raise NotYet(f"right for the first {same} characters, up to ...{there!r}. Look at what comes next.")


@exercise("the function itself, without brackets", function)
def check_leaks(find_leaks: Callable[[list[str], list[str]], Any]) -> str:
    """Hard. `find_leaks(training, validation)`: positions in `validation` of questions that also stand in `training`."""
    for validation, positions, overlooked in LEAKS:
        found = attempt(lambda held_out=validation: sorted(int(p) for p in find_leaks(list(QUESTIONS), list(held_out))))
        if found != positions:
            raise NotYet(f"{overlooked}.")
    return "Right: it finds what differs only in form. Questions that say the same in other words need the kit's split, or your eyes."

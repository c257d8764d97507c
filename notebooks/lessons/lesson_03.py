"""Words and tables of lesson 03: what damage was done to an answer, and what a run made of it.

side_by_side_answers(clean, noisy, rows=5)

Checks of lesson 03's exercises. Each prints one line: Right, Not yet, or Your turn; none raises.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedTokenizerBase


def side_by_side_answers(
    clean: Sequence[dict[str, Any]], noisy: Sequence[dict[str, Any]], rows: int = 5
) -> pd.DataFrame:
    """The first `rows` answers that differ, clean and noisy beside each other, with their lines joined by " / "."""
    import pandas as pd

    pairs = [(_answer(one), _answer(other)) for one, other in zip(clean, noisy)]
    chosen = [pair for pair in pairs if pair[0] != pair[1]][:rows]
    return pd.DataFrame(chosen, columns=["clean answer", "what the noisy file says"])


def _answer(example: dict[str, Any]) -> str:
    return example["completion"][0]["content"].replace("\n", " / ")


def check_max_length(answer: Any, token_lengths: Sequence[int], share: float = 0.95, multiple: int = 32) -> None:
    """Easy. `answer`: the smallest multiple of `multiple` that covers at least `share` of the examples."""
    from helpers.data.tokens import coverage

    if answer is None:
        print("Your turn: a number of tokens.")
    elif isinstance(answer, bool) or not isinstance(answer, (int, float)) or answer != answer or answer <= 0:
        print("Not yet: the answer is a number of tokens above zero.")
    elif answer % multiple:
        print(f"Not yet: {answer} is no multiple of {multiple}.")
    elif coverage(token_lengths, answer) < share:
        print(
            f"Not yet: {answer} tokens hold {coverage(token_lengths, answer):.1%} of the examples whole, which is less than {share:.0%}."
        )
    elif coverage(token_lengths, answer - multiple) >= share:
        print(f"Not yet: {answer} is enough, but so is less; every token of max_length costs memory.")
    else:
        print(
            f"Right: the longest example alone would need {max(token_lengths)}; a few long ones need not decide what all cost."
        )


def check_template(answer: Any, messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> None:
    """Medium. `answer`: the conversation as text, as the tokenizer's chat template writes it."""
    if answer is None:
        print("Your turn: one text with all messages and marks.")
        return
    if not isinstance(answer, str):
        print(f"Not yet: the answer is a text, this is {type(answer).__name__}.")
        return
    wanted = tokenizer.apply_chat_template(messages, tokenize=False)
    if answer == wanted:
        print("Right: these marks are all that tells the model who is speaking and where an answer ends.")
    elif answer.strip() == wanted.strip():
        print("Not yet: only white space at the beginning or the end differs. To the model a line break is a token.")
    elif missing := [message["role"] for message in messages if message["content"] not in answer]:
        print(f"Not yet: the text of the {missing[0]} is not in it, or not word for word.")
    else:
        same = next(
            (place for place, (one, other) in enumerate(zip(answer, wanted)) if one != other),
            min(len(answer), len(wanted)),
        )
        print(
            f"Not yet: right for the first {same} characters, up to ...{answer[max(0, same - 20) : same]!r}. Look at what comes next."
        )


def check_leaks(find_leaks: Callable[[list[str], list[str]], Any] | None) -> None:
    """Hard. `find_leaks(training, validation)`: positions in `validation` of questions that also stand in `training`."""
    if find_leaks is None:
        print("Your turn: write the function, then name it here.")
        return
    if not callable(find_leaks):
        print("Not yet: give the function itself, without brackets after its name.")
        return
    training = ["Where is my parcel?", "Can I pay by card?", "The lid is broken", "Do you repair shears?"]
    trials = [  # (validation, positions, what a function that fails here has overlooked)
        (
            ["May I come by?", "Can I pay by card?"],
            [1],
            "a question that stands in both parts word for word was not found",
        ),
        (["where is my PARCEL?"], [0], "the same question in other capitals is the same question"),
        (
            ["The lid is broken!!", "Do you repair shears"],
            [0, 1],
            "with other punctuation it is still the same question",
        ),
        (["  The  lid\nis broken "], [0], "spaces and line breaks do not make another question"),
        (
            ["Where is my card?", "Can I pay?", "broken"],
            [],
            "a question that only shares words with another is no leak",
        ),
        (
            ["Do you repair shears?", "Hello", "Do you repair shears?"],
            [0, 2],
            "each leaked question counts, also the second time",
        ),
        ([], [], "an empty part has no leaks"),
    ]
    for validation, positions, overlooked in trials:
        try:  # what a learner writes may do anything
            found = find_leaks(list(training), list(validation))
            found = sorted(int(position) for position in found)
        except Exception as error:
            said = str(error).partition("\n")[0]
            print(
                f"Not yet: your function stopped, or returned no list of positions ({type(error).__name__}: {said:.80})."
            )
            return
        if found != positions:
            print(f"Not yet: {overlooked}.")
            return
    print(
        "Right: it finds what differs only in form. Questions that say the same in other words need the kit's split, or your eyes."
    )

"""Lesson 03: one example as colored tokens, answers of two files beside each other, and the checks of the exercises.

show_tokens(examples[0], tokenizer)                 # trained and masked tokens, seen with your own eyes
side_by_side_answers(clean, noisy, rows=5)
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd

from helpers.data.tokens import MASKED, coverage, tokenize
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


# ------------------------------------------------------------------------------------------- tokens and answers, shown

LONGEST_VIEW = 4000  # spans drawn; a browser gets slow beyond that
# Trained tokens are underlined, masked ones pale, cut ones struck through, special ones framed: color is never the only
# sign, and tints are transparent, so light and dark themes both work.
STYLES = {
    "trained": "background:rgba(46,160,67,.28);border-bottom:2px solid rgb(46,160,67)",
    "masked": "opacity:.72;border-bottom:1px dotted rgba(128,128,128,.9)",
    "cut": "background:rgba(228,87,86,.20);text-decoration:line-through",
}
SPECIAL = "border:1px solid rgba(128,128,128,.9);border-radius:3px;padding:0 2px;font-size:90%"
LEGEND = {"trained": "counts in the loss", "masked": "read, not learned", "cut": "beyond max_length, never seen"}
BRACKETS = {"trained": ("[[", "]]"), "masked": ("", ""), "cut": ("{{", "}}")}


class TokenSpan(NamedTuple):
    """One token, or the few that make up one character."""

    text: str
    state: str
    special: bool
    tokens: int = 1

    def html(self) -> str:
        """For a page. Exported pages drop ordinary spaces after a line break, so indents become spaces that stay."""
        indented = re.sub(r"(?<=\n) +| {2,}", lambda spaces: "\u00a0" * len(spaces[0]), self.text)
        text = html.escape(indented).replace("\n", "<span style='opacity:.6'>↵</span>\n") or "&#8709;"
        style = STYLES[self.state] + (f";{SPECIAL}" if self.special else "")
        return f"<span style='{style}' title='{self.state}'>{text}</span>"


@dataclass(repr=False)
class TokenView:
    """What `show_tokens` returns: colored in a notebook, in brackets where it is printed."""

    spans: list[TokenSpan]

    def count(self, state: str) -> int:
        """Tokens that are "trained", "masked" or "cut"."""
        return sum(span.tokens for span in self.spans if span.state == state)

    @property
    def summary(self) -> str:
        """The counts in words."""
        counts = [f"{self.count(state)} {state}" for state in STYLES if self.count(state) or state != "cut"]
        whole = "" if self.count("masked") else "; plain text: the loss counts every token"
        return f"{sum(span.tokens for span in self.spans)} tokens: {', '.join(counts)}{whole}"

    def __str__(self) -> str:
        parts = []
        for state, spans in groupby(self.spans, key=lambda span: span.state):
            before, after = BRACKETS[state]
            parts.append(before + "".join(span.text for span in spans) + after)
        return f"{self.summary}  ([[trained]], masked{', {{cut}}' if self.count('cut') else ''})\n{''.join(parts)}"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        body = "".join(span.html() for span in self.spans[:LONGEST_VIEW])
        if len(self.spans) > LONGEST_VIEW:
            body += f" ... and {len(self.spans) - LONGEST_VIEW} more"
        legend = f"<span style='{SPECIAL}'>special token</span>"
        for state, meaning in LEGEND.items():
            legend += f" &nbsp; <span style='{STYLES[state]}'>{state}: {meaning}</span>" if self.count(state) else ""
        style = "font-family:monospace;white-space:pre-wrap;line-height:1.9;overflow-wrap:anywhere"
        title = f"<p><b>{html.escape(self.summary)}</b><br>{legend}</p>"
        return f"<div style='font-size:13px'>{title}<div style='{style}'>{body}</div></div>"


def show_tokens(
    example: dict[str, Any], tokenizer: PreTrainedTokenizerBase, max_length: int | None = None
) -> TokenView:
    """One example with its trained and masked tokens told apart.

    Args:
        example: prompt and completion messages, or {"text": ...}; an example of the loaded data.
        max_length: also shows which tokens would be cut.
    """
    [tokens] = tokenize([example], tokenizer)
    states = ["masked" if label == MASKED else "trained" for label in tokens.labels[:max_length]]
    states += ["cut"] * (len(tokens.ids) - len(states))
    spans, waiting = [], []
    for token, state, following in zip(tokens.ids, states, [*states[1:], ""]):
        waiting.append(token)
        text = tokenizer.decode(waiting, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if "\ufffd" in text and len(waiting) < 4 and following == state:
            continue  # only part of a character: the next token may make it whole
        if tokenizer.convert_ids_to_tokens(token).startswith("\u2581") and not text.startswith(" "):
            text = " " + text  # SentencePiece drops the space before a token that stands alone
        special = len(waiting) == 1 and token in tokenizer.added_tokens_decoder
        spans.append(TokenSpan(text, state, special, len(waiting)))
        waiting = []
    return TokenView(spans)


def side_by_side_answers(
    clean: Sequence[dict[str, Any]], noisy: Sequence[dict[str, Any]], rows: int = 5
) -> pd.DataFrame:
    """The first `rows` answers that differ, clean and noisy beside each other, with their lines joined by " / "."""
    pairs = [(_answer(one), _answer(other)) for one, other in zip(clean, noisy)]
    chosen = [pair for pair in pairs if pair[0] != pair[1]][:rows]
    return pd.DataFrame(chosen, columns=["clean answer", "what the noisy file says"])


def _answer(example: dict[str, Any]) -> str:
    return example["completion"][0]["content"].replace("\n", " / ")


# ------------------------------------------------------------------------------------------- checks of the exercises


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

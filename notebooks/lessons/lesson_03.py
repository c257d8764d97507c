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
from typing import Any, NamedTuple

import pandas as pd
from transformers import PreTrainedTokenizerBase as Tokenizer

from helpers.data.tokens import MASKED, coverage, tokenize
from notebooks.lessons.scaffold import NotYet, attempt, exercise, must_read, number, text

Example = dict[str, Any]  # messages under prompt and completion, or a text


class Look(NamedTuple):
    """How tokens of one state are shown: on a page, and between brackets where there is only text."""

    css: str
    meaning: str
    before: str = ""
    after: str = ""


# Trained tokens are underlined, masked ones pale, cut ones struck through, special ones framed: color is never the only
# sign, and tints are transparent, so light and dark themes both work.
LOOKS = {
    "trained": Look("background:#2ea04347;border-bottom:2px solid #2ea043", "counts in the loss", "[[", "]]"),
    "masked": Look("opacity:.72;border-bottom:1px dotted #808080", "read, not learned"),
    "cut": Look("background:#e4575633;text-decoration:line-through", "beyond max_length, never seen", "{{", "}}"),
}
SPECIAL = "border:1px solid #808080;border-radius:3px;padding:0 2px;font-size:90%"
PAGE = "font-family:monospace;white-space:pre-wrap;line-height:1.9;overflow-wrap:anywhere"


class TokenSpan(NamedTuple):
    """One token, or the few that make up one character."""

    text: str
    state: str
    special: bool
    tokens: int = 1

    def html(self) -> str:
        """For a page. Exported pages drop ordinary spaces after a line break, so indents become spaces that stay."""
        indented = re.sub(r"(?<=\n) +| {2,}", lambda spaces: "\u00a0" * len(spaces[0]), self.text)
        shown = html.escape(indented).replace("\n", "<span style='opacity:.6'>↵</span>\n") or "&#8709;"
        css = LOOKS[self.state].css + (f";{SPECIAL}" if self.special else "")
        return f"<span style='{css}' title='{self.state}'>{shown}</span>"


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
        counts = [f"{self.count(state)} {state}" for state in LOOKS if self.count(state) or state != "cut"]
        whole = "" if self.count("masked") else "; plain text: the loss counts every token"
        return f"{sum(span.tokens for span in self.spans)} tokens: {', '.join(counts)}{whole}"

    def __repr__(self) -> str:
        parts = []
        for state, spans in groupby(self.spans, key=lambda span: span.state):
            parts += [LOOKS[state].before, *(span.text for span in spans), LOOKS[state].after]
        return f"{self.summary}  ([[trained]], masked{', {{cut}}' if self.count('cut') else ''})\n{''.join(parts)}"

    def _repr_html_(self) -> str:
        body = "".join(span.html() for span in self.spans)
        legend = [f"<span style='{SPECIAL}'>special token</span>"]
        shown = {state: look for state, look in LOOKS.items() if self.count(state)}
        legend += [f"<span style='{look.css}'>{state}: {look.meaning}</span>" for state, look in shown.items()]
        title = f"<p><b>{html.escape(self.summary)}</b><br>{' &nbsp; '.join(legend)}</p>"
        return f"<div style='font-size:13px'>{title}<div style='{PAGE}'>{body}</div></div>"


def show_tokens(example: Example, tokenizer: Tokenizer, max_length: int | None = None) -> TokenView:
    """One example of the loaded data with its trained and masked tokens told apart, and those that `max_length` would cut."""
    [tokens] = tokenize([example], tokenizer)
    states = ["masked" if label == MASKED else "trained" for label in tokens.labels[:max_length]]
    states += ["cut"] * (len(tokens.ids) - len(states))
    spans, waiting = [], []
    for token, state, following in zip(tokens.ids, states, [*states[1:], ""]):
        waiting.append(token)
        piece = tokenizer.decode(waiting, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if "\ufffd" in piece and len(waiting) < 4 and following == state:
            continue  # only part of a character: the next token may make it whole
        if tokenizer.convert_ids_to_tokens(token).startswith("\u2581") and not piece.startswith(" "):
            piece = " " + piece  # SentencePiece drops the space before a token that stands alone
        special = len(waiting) == 1 and token in tokenizer.added_tokens_decoder
        spans.append(TokenSpan(piece, state, special, len(waiting)))
        waiting = []
    return TokenView(spans)


def side_by_side_answers(clean: Sequence[Example], noisy: Sequence[Example], rows: int = 5) -> pd.DataFrame:
    """The first `rows` answers that differ, clean and noisy beside each other, with their lines joined by " / "."""
    files = {"clean answer": clean, "what the noisy file says": noisy}
    texts = {
        name: [row["completion"][0]["content"].replace("\n", " / ") for row in file] for name, file in files.items()
    }
    table = pd.DataFrame(texts)
    return table[table.iloc[:, 0] != table.iloc[:, 1]].head(rows)


# ------------------------------------------------------------------------------------------- checks of the exercises

QUESTIONS = ["Where is my parcel?", "Can I pay by card?", "The lid is broken", "Do you repair shears?"]
# (validation, positions that leak, what a function that fails here has overlooked)
LEAKS: list[tuple[list[str], list[int], str]] = [
    (["May I come by?", "Can I pay by card?"], [1], "a question that stands in both parts word for word was not found"),
    (["where is my PARCEL?"], [0], "the same question in other capitals is the same question"),
    (["The lid is broken!!", "Do you repair shears"], [0, 1], "with other punctuation it is still the same question"),
    (["  The  lid\nis broken "], [0], "spaces and line breaks do not make another question"),
    (["Where is my card?", "Can I pay?", "broken"], [], "a question that only shares words with another is no leak"),
    ([QUESTIONS[3], "Hello", QUESTIONS[3]], [0, 2], "each leaked question counts, also the second"),
    ([], [], "an empty part has no leaks"),
]


@exercise("a number of tokens above zero", number)
def check_max_length(answer: float, token_lengths: Sequence[int]) -> str:
    """Easy. `answer`: the smallest multiple of 32 that covers at least 95 % of the examples."""
    if answer <= 0 or answer % 32:
        raise NotYet(f"{answer} is no multiple of 32 above zero.")
    covered = coverage(token_lengths, int(answer))
    if covered < 0.95:
        raise NotYet(f"{answer} tokens hold {covered:.1%} of the examples whole, which is less than 95 %.")
    if coverage(token_lengths, int(answer) - 32) >= 0.95:
        raise NotYet(f"{answer} is enough, but so is less; every token of max_length costs memory.")
    longest = max(token_lengths)
    return f"Right: the longest example alone would need {longest}; a few long ones need not decide what all cost."


@exercise("one text with all messages and marks", text)
def check_template(answer: str, messages: list[dict[str, str]], tokenizer: Tokenizer) -> str:
    """Medium. `answer`: the conversation as text, as the tokenizer's chat template writes it."""
    must_read(answer, tokenizer.apply_chat_template(messages, tokenize=False))
    return "Right: these marks are all that tells the model who is speaking and where an answer ends."


@exercise()
def check_leaks(find_leaks: Callable[[list[str], list[str]], Any]) -> str:
    """Hard. `find_leaks(training, validation)`: positions in `validation` of questions that also stand in `training`."""
    for validation, positions, overlooked in LEAKS:
        found = attempt(find_leaks, list(QUESTIONS), list(validation), kind=lambda found: sorted(map(int, found)))
        if found != positions:
            raise NotYet(f"{overlooked}.")
    return "Right: it finds what differs only in form. Questions that say the same in other words need the kit's split, or your eyes."

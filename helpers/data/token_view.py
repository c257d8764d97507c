"""One example as tokens, drawn: what is trained, what is masked, what would be cut.

    TokenView(pieces(ids, trained, tokenizer))      # last line of a cell: colored; print(): with brackets

Trained tokens are underlined and tinted, masked ones are pale, cut ones struck through, special ones framed: color is never the only
sign, and tints are transparent, so light and dark themes both work.
"""

from __future__ import annotations

import html
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

LONGEST = 4000  # pieces drawn; a browser gets slow beyond that
STYLES = {
    "trained": "background:rgba(46,160,67,.28);border-bottom:2px solid rgb(46,160,67)",
    "masked": "opacity:.72;border-bottom:1px dotted rgba(128,128,128,.9)",
    "cut": "background:rgba(228,87,86,.20);text-decoration:line-through",
}
SPECIAL = "border:1px solid rgba(128,128,128,.9);border-radius:3px;padding:0 2px;font-size:90%"
LEGEND = {
    "trained": "trained: counts in the loss",
    "masked": "masked: read, not learned",
    "cut": "cut: beyond max_length, never seen",
}
INDENT = re.compile(r"(?<=\n) +| {2,}")


class Piece(NamedTuple):
    """One token, or the few that make up one character."""

    text: str
    state: str
    special: bool
    tokens: int = 1


def pieces(ids: list[int], trained: list[bool], tokenizer: Any, max_length: int | None = None) -> list[Piece]:
    """Tokens as text. Those that are only part of a character are joined until the character is whole."""
    found, waiting = [], []
    added = tokenizer.added_tokens_decoder
    for position, (token, is_trained) in enumerate(zip(ids, trained)):
        state = "cut" if max_length and position >= max_length else "trained" if is_trained else "masked"
        waiting.append(token)
        text = tokenizer.decode(waiting, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        last = position + 1 == len(ids) or trained[position + 1] != is_trained or position + 1 == max_length
        if "\ufffd" in text and len(waiting) < 4 and not last:
            continue
        if tokenizer.convert_ids_to_tokens(token).startswith("\u2581") and not text.startswith(" "):
            text = " " + text  # SentencePiece drops the space before a token that stands alone
        found.append(Piece(text, state, len(waiting) == 1 and token in added, len(waiting)))
        waiting = []
    return found


@dataclass
class TokenView:
    """What `show_tokens` returns."""

    pieces: list[Piece]

    def count(self, state: str) -> int:
        """Tokens that are "trained", "masked" or "cut"."""
        return sum(piece.tokens for piece in self.pieces if piece.state == state)

    @property
    def summary(self) -> str:
        parts = [f"{self.count(state)} {state}" for state in STYLES if self.count(state) or state != "cut"]
        whole = "" if self.count("masked") else "; plain text: the loss counts every token"
        return f"{sum(piece.tokens for piece in self.pieces)} tokens: {', '.join(parts)}{whole}"

    def __str__(self) -> str:
        """Trained text in [[ ]], cut text in {{ }}."""
        brackets = {"trained": ("[[", "]]"), "masked": ("", ""), "cut": ("{{", "}}")}
        text, before = "", "masked"
        for piece in [*self.pieces, Piece("", "masked", False)]:
            if piece.state != before:
                text += brackets[before][1] + brackets[piece.state][0]
                before = piece.state
            text += piece.text
        return f"{self.summary}  ([[trained]], masked{', {{cut}}' if self.count('cut') else ''})\n{text}"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        shown = self.pieces[:LONGEST]
        body = "".join(_span(piece) for piece in shown)
        if len(shown) < len(self.pieces):
            body += f" ... and {len(self.pieces) - len(shown)} more"
        legend = " &nbsp; ".join(
            f"<span style='{STYLES[state]}'>{LEGEND[state]}</span>" for state in STYLES if self.count(state)
        )
        legend += f" &nbsp; <span style='{SPECIAL}'>special token</span>"
        return (
            f"<div style='font-size:13px'><p><b>{html.escape(self.summary)}</b><br>{legend}</p>"
            f"<div style='font-family:monospace;white-space:pre-wrap;line-height:1.9;overflow-wrap:anywhere'>{body}</div></div>"
        )


def _span(piece: Piece) -> str:
    indented = INDENT.sub(
        lambda match: "\u00a0" * len(match[0]), piece.text
    )  # exported pages drop ordinary spaces there
    text = html.escape(indented).replace("\n", "<span style='opacity:.6'>↵</span>\n") or "&#8709;"
    style = STYLES[piece.state] + (f";{SPECIAL}" if piece.special else "")
    return f"<span style='{style}' title='{piece.state}'>{text}</span>"

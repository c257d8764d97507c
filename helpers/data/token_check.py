"""What the tokens of a data set say: lengths, what is trained, what would be cut, and whether an answer ever ends.

    check = TokenCheck(tokenizer, max_length=512)
    check.add(example, tokens, "line 3")
    check.stop(), print(check)

Filled by `helpers.data.tokens` (all at once) and by `helpers.data.checks` (batch by batch).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

MASKED = -100  # the label that the loss ignores
END_WITHIN = 3  # the end token is looked for among the last trained tokens: some templates put a line break after it


class Tokens(NamedTuple):
    """One example as TRL trains it: the label of a token is its id, or `MASKED`."""

    ids: list[int]
    labels: list[int]

    @property
    def trained(self) -> int:
        return len(self.labels) - self.labels.count(MASKED)


def coverage(token_lengths: Sequence[int], max_length: int) -> float:
    """Share of the examples that fit `max_length` whole."""
    return sum(length <= max_length for length in token_lengths) / max(1, len(token_lengths))


@dataclass
class TokenCheck:
    """What the tokens of a data set say. Fed batch by batch, asked at the end."""

    tokenizer: Any
    max_length: int | None = None
    lengths: list[int] = field(default_factory=list)
    """Tokens of every example that was read, also of those that do not fit."""
    looked_at: int = 0
    trained: int = 0
    """Tokens that count in the loss, cut ones left out."""
    ended: int = 0
    """Examples whose end token is trained."""
    masked: list[str] = field(default_factory=list)
    """Places of examples without a single trained token."""
    same: tuple[str, str] | None = None
    """Places of two examples in a row that differ as text but not as tokens."""
    other_end: str = ""
    """What ends the answers, where it is not the tokenizer's end token."""
    _previous: tuple[str, Any, list[int]] | None = None

    def add(self, example: dict[str, Any], tokens: Tokens, place: str) -> None:
        labels = tokens.labels[: self.max_length]
        trained = [label for label in labels if label != MASKED]
        self.looked_at += 1
        self.trained += len(trained)
        if not trained:
            self.masked.append(place)
        end = next((token for token in reversed(trained[-END_WITHIN:]) if self._ends(token)), None)
        self.ended += end is not None
        if end is not None and end != self.tokenizer.eos_token_id:
            self.other_end = self.tokenizer.convert_ids_to_tokens(end)
        text = [example.get(part) for part in ("prompt", "completion", "text")]
        if self._previous and self._previous[2] == tokens.ids and self._previous[1] != text and self.same is None:
            self.same = (self._previous[0], place)
        self._previous = (place, text, tokens.ids)

    def _ends(self, token: int) -> bool:
        added = self.tokenizer.added_tokens_decoder
        return token == self.tokenizer.eos_token_id or (token in added and added[token].special)

    @property
    def cut_tokens(self) -> int:
        """Tokens beyond `max_length`, which would not be trained."""
        return sum(max(0, length - self.max_length) for length in self.lengths) if self.max_length else 0

    def stop(self) -> str | None:
        """Why training must not start, in one sentence with the fix; None if it may."""
        if not self.looked_at:
            return None
        if len(self.masked) == self.looked_at:
            return (
                "Every label is masked, so nothing would be learned. Raise max_length, or check with show_tokens(examples[0], tokenizer) "
                "that the chat template writes the answers at all."
            )
        if self.same:
            return (
                f"{self.same[0]} and {self.same[1]} differ as text but get identical tokens: the chat template leaves their text out. "
                "Mend tokenizer.chat_template, or delete it and call ensure_chat_template(tokenizer)."
            )
        if not self.ended:
            return (
                f"No answer ends with a trained end token, so the model would never learn to stop. Let the chat template write "
                f"{self.tokenizer.eos_token or 'the end token'} after each answer, and raise max_length if all answers are cut."
            )
        return None

    def __str__(self) -> str:
        ordered = sorted(self.lengths)
        if not ordered:
            return "No example to look at."
        lines = [
            f"tokens per example: half have up to {ordered[len(ordered) // 2]}, the longest has {ordered[-1]}; {self.trained:,} are trained"
        ]
        if self.max_length:
            lines.append(
                f"max_length {self.max_length} covers {coverage(ordered, self.max_length):.1%} of the examples"
                + (f"; the others have {self.cut_tokens:,} tokens too many" if self.cut_tokens else "")
            )
        lines.append(f"the end token is trained in {self.ended:,} of {self.looked_at:,} examples")
        if self.other_end:
            lines.append(
                f"answers end with {self.other_end}, the tokenizer's end token is {self.tokenizer.eos_token}: "
                f"if the trained model does not stop, set tokenizer.eos_token = {self.other_end!r}"
            )
        if self.tokenizer.pad_token_id in (None, self.tokenizer.eos_token_id):
            lines.append(
                "padding uses the end token: harmless here, because TRL masks padding by position and keeps real end tokens"
            )
        return "\n".join(lines)

"""What the model will see: every example as tokens, which of them are trained, and whether an answer ever ends.

    tokenize(examples, tokenizer)[0].ids, .labels       # one example: token ids, and what is trained of them
    with_tokens(examples, tokenizer, max_length=512)    # a data set with `input_ids` and `labels`, for SFTTrainer

The check, training and evaluation all use these tokens, which are those that TRL would make itself.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from helpers.data.issues import DataError, first_line
from helpers.hub import limited_template

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

TURN = re.compile(r"<[|\uff5c].*?[|\uff5c]>")  # how most models write the marks of a turn
MASKED = -100  # the label that the loss ignores
END_WITHIN = 3  # the end token is looked for among the last trained tokens: some templates put a line break after it
PLAIN_TEMPLATE = (  # for base models: headings in plain words, and the end token after every answer
    "{% for message in messages %}{% if not loop.first %}{{ '\n\n' }}{% endif %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}"
    "{% elif message['role'] == 'user' %}{{ '### Question:\n' + message['content'] }}"
    "{% else %}{{ '### Answer:\n' + message['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n\n### Answer:\n' }}{% endif %}"
)


class Tokens(NamedTuple):
    """One example as it is trained: the label of a token is its id, or `MASKED`."""

    ids: list[int]
    labels: list[int]

    @property
    def trained(self) -> int:
        """How many tokens count in the loss."""
        return len(self.labels) - self.labels.count(MASKED)


def tokenize(examples: Iterable[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> list[Tokens]:
    """Every example as tokens and labels, before anything is cut. Of a chat, only the completion is trained.

    Raises DataError if the tokenizer has no chat template, or its template refuses an example.
    """
    return [_tokens(example, tokenizer) for example in examples]


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Finds what this tokenizer does not take for text, such as the end of a turn: `control_tokens(tokenizer).search(text)`.

    That are its special tokens, and other added ones that its chat template writes around turns (<|user|>). Answers may have <think>.
    """
    added, template = tokenizer.added_tokens_decoder.values(), str(tokenizer.chat_template or "")
    of_turns = TURN.findall(template)
    tokens = [
        token.content for token in added if token.content.strip() and (token.special or token.content in of_turns)
    ]
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")


def with_tokens(examples: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None) -> Dataset:
    """The examples with `input_ids` and `labels`, cut to `max_length` tokens: `SFTTrainer` trains on these.

    Raises DataError if there is none, or one holds a control token: what follows that could pass for another turn.
    """
    if not len(examples):
        raise DataError("There is no example to train on, or none to validate with. Add examples.")
    control = control_tokens(tokenizer)

    def columns(example: dict[str, Any]) -> dict[str, list[int]]:
        said = [message["content"] for part in ("prompt", "completion") for message in example.get(part) or []]
        if found := next(filter(None, map(control.search, said)), None):
            fix = "load_examples(..., tokenizer=tokenizer) sets such rows aside."
            raise DataError(f"An example holds {found[0]!r}, which is no text to this model. {fix}")
        tokens = _tokens(example, tokenizer)
        return {"input_ids": tokens.ids[:max_length], "labels": tokens.labels[:max_length]}

    return examples.map(columns)


@limited_template()
def _tokens(example: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> Tokens:
    if example.get("prompt") is None:
        text, end = example["text"], tokenizer.eos_token or ""
        ids = tokenizer(text if text.endswith(end) else text + end)["input_ids"]
        return Tokens(ids, list(ids))
    if not tokenizer.chat_template:
        fix = "Call ensure_chat_template(tokenizer) first, or choose an -Instruct model."
        raise DataError(f"This tokenizer has no chat template, as base models do. {fix}")
    prompt, whole = example["prompt"], example["prompt"] + example["completion"]
    try:
        asked = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
        ids = tokenizer.apply_chat_template(whole, return_dict=True)["input_ids"]
    except Exception as error:  # a chat template is a small program of the model's: it may raise what it likes
        raise DataError(f"The model's chat template refuses an example ({first_line(error)}). Change it.") from error
    masked = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(asked, ids)))
    if masked < len(asked):
        warnings.warn("The chat template writes the end of a question differently once it is answered.", stacklevel=2)
    return Tokens(ids, [MASKED] * masked + ids[masked:])


def lengths(examples: Iterable[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens of each example, prompt and answer together."""
    return [len(tokens.ids) for tokens in tokenize(examples, tokenizer)]


def coverage(token_lengths: Sequence[int], max_length: int) -> float:
    """Share of the examples that fit `max_length` whole."""
    return sum(length <= max_length for length in token_lengths) / max(1, len(token_lengths))


def ensure_chat_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Give the tokenizer of a base model a plain chat template; True if it had none. What is there is never replaced.

    Raises DataError if the tokenizer has no end token, so that an answer could not end.
    """
    if tokenizer.chat_template:
        return False
    if not tokenizer.eos_token:
        raise DataError("This tokenizer has no end token. Set tokenizer.eos_token to one of its special tokens.")
    starts = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    tokenizer.chat_template = ("{{ bos_token }}" if starts else "") + PLAIN_TEMPLATE
    return True


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model: a name from the menu, a folder, or a Hub id. The bundled model's comes with weights.

    Raises DataError if there is no such model, it is gated, or no network.
    """
    from huggingface_hub.errors import GatedRepoError
    from transformers import AutoTokenizer

    from helpers.hub import how_to_open
    from helpers.registry import BUNDLED_MODEL, resolve
    from helpers.setup import hub_reachable
    from helpers.weights import fetch_weights

    model = resolve(name)
    try:
        place = Path(fetch_weights(model) if model == BUNDLED_MODEL else model)
        in_folder = place.is_dir()
        only_local = in_folder or not hub_reachable()
        return AutoTokenizer.from_pretrained(
            place if in_folder else model, local_files_only=only_local, trust_remote_code=False
        )
    except Exception as error:  # no network, no such model, gated: each fails in its own way
        if isinstance(error.__cause__, GatedRepoError):
            raise DataError(how_to_open(model)) from None
        raise DataError(f"No tokenizer for {name!r} ({first_line(error)}). Check the name and the network.") from None


@dataclass
class TokenCheck:
    """What the tokens of a data set say. Fed example by example, asked at the end."""

    tokenizer: Any
    max_length: int | None = None
    lengths: list[int] = field(default_factory=list)  # tokens of every example that was read, also of those too long
    looked_at: int = 0
    trained: int = 0  # tokens that count in the loss, cut ones left out
    ended: int = 0  # examples whose end token is trained
    masked: int = 0  # examples without a single trained token
    same: tuple[str, str] | None = None  # places of two examples in a row that differ as text but not as tokens
    other_end: str = ""  # what ends the answers, where it is not the tokenizer's end token
    _previous: tuple[str, Any, list[int]] = ("", None, [])

    def add(self, example: dict[str, Any], tokens: Tokens, place: str) -> None:
        """One example that will be trained."""
        trained = [label for label in tokens.labels[: self.max_length] if label != MASKED]
        self.looked_at += 1
        self.trained += len(trained)
        self.masked += not trained
        end = next((token for token in reversed(trained[-END_WITHIN:]) if self._ends(token)), None)
        self.ended += end is not None
        if end is not None and end != self.tokenizer.eos_token_id:
            self.other_end = self.tokenizer.convert_ids_to_tokens(end)
        text = [example.get(part) for part in ("prompt", "completion", "text")]
        place_before, text_before, ids_before = self._previous
        if ids_before == tokens.ids and text_before != text:
            self.same = self.same or (place_before, place)
        self._previous = (place, text, tokens.ids)

    def _ends(self, token: int) -> bool:
        added = self.tokenizer.added_tokens_decoder
        return token == self.tokenizer.eos_token_id or (token in added and added[token].special)

    def stop(self) -> str:
        """Why training must not start, with the fix; empty if it may."""
        if self.looked_at and self.masked == self.looked_at:
            return "Every label is masked, so nothing would be learned. Raise max_length, or check the answers."
        if self.same:
            return (
                f"{self.same[0]} and {self.same[1]} differ as text but get identical tokens: the chat template leaves "
                "their text out. Delete tokenizer.chat_template and call ensure_chat_template(tokenizer)."
            )
        if self.looked_at and not self.ended:
            return (
                "No answer ends with a trained end token, so the model would never learn to stop. Raise max_length if "
                f"all are cut; otherwise let the chat template write {self.tokenizer.eos_token} after each answer."
            )
        return ""

    def __str__(self) -> str:
        if not self.lengths:
            return "No example to look at."
        half, longest, end = sorted(self.lengths)[len(self.lengths) // 2], max(self.lengths), self.tokenizer.eos_token
        lines = [f"tokens per example: half have up to {half}, the longest has {longest}; {self.trained:,} are trained"]
        if self.max_length:
            too_many = sum(max(0, length - self.max_length) for length in self.lengths)
            covered = f"covers {coverage(self.lengths, self.max_length):.1%} of the examples"
            others = f"; the others have {too_many:,} tokens too many" if too_many else ""
            lines.append(f"max_length {self.max_length} {covered}{others}")
        lines.append(f"the end token is trained in {self.ended:,} of {self.looked_at:,} examples")
        if self.other_end:
            fix = f"if the trained model does not stop, set tokenizer.eos_token = {self.other_end!r}"
            lines.append(f"answers end with {self.other_end}, the tokenizer's end token is {end}: {fix}")
        if self.tokenizer.pad_token_id in (None, self.tokenizer.eos_token_id):
            lines.append("padding uses the end token: harmless here, as TRL masks padding by position")
        return "\n".join(lines)

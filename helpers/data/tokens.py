"""What the tokens of a data set say: lengths, what is trained, what would be cut, and whether an answer ever ends.

    check = TokenCheck(tokenizer, max_length=512)
    check.add(example, tokens, "line 3")
    check.stop(), print(check)

Filled by `helpers.data.tokens` (all at once) and by `helpers.data.check` (batch by batch).

What the model will see: every example as tokens, which of them are trained, and whether an answer ever ends.

    check = check_tokens(examples, tokenizer, max_length=512)     # stops where training would learn nothing, or never learn to stop
    print(check)
    show_tokens(examples[0], tokenizer)                            # trained and masked tokens, seen with your own eyes

The tokens come from TRL's own preparation of the data, so what is checked and shown here is what `SFTTrainer` trains.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

from datasets import Dataset

from helpers.data.issues import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from helpers.data.token_view import TokenView


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


__all__ = [
    "MASKED",
    "TokenCheck",
    "Tokens",
    "check_tokens",
    "coverage",
    "ensure_chat_template",
    "lengths",
    "load_tokenizer",
    "show_tokens",
    "tokenize",
]
PLAIN_TEMPLATE = (  # for base models: headings in plain words, and the end token after every answer
    "{% for message in messages %}{% if not loop.first %}{{ '\n\n' }}{% endif %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}"
    "{% elif message['role'] == 'user' %}{{ '### Question:\n' + message['content'] }}"
    "{% else %}{{ '### Answer:\n' + message['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n\n### Answer:\n' }}{% endif %}"
)


def tokenize(examples: Dataset, tokenizer: PreTrainedTokenizerBase) -> list[Tokens]:
    """Every example as tokens and labels, by TRL's own code, before anything is cut.

    Raises:
        DataError: the tokenizer has no chat template, or its template refuses an example.
    """
    from trl import SFTTrainer

    if not len(examples):
        return []
    if "prompt" in examples.column_names and not tokenizer.chat_template:
        raise DataError(
            "This tokenizer has no chat template, as base models do. Call ensure_chat_template(tokenizer) first, or choose an "
            "-Instruct model."
        )
    settings = SimpleNamespace(
        dataset_num_proc=None,
        dataset_text_field="text",
        assistant_only_loss=False,
        max_length=None,
        truncation_mode="keep_start",
        shuffle_dataset=False,
        packing=False,
        seed=0,
    )
    trainer = SimpleNamespace(
        _tokenizer=tokenizer, chat_template=None, completion_only_loss="prompt" in examples.column_names
    )
    columns = [name for name in ("prompt", "completion", "text") if name in examples.column_names]
    try:
        prepared = SFTTrainer._prepare_dataset(
            trainer, examples.select_columns(columns), tokenizer, settings, False, None, "checked"
        )
    except Exception as error:  # a chat template is a small program of the model's: it may raise what it likes
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"The model's chat template refuses an example ({said:.200}). Change the example, or choose another model."
        ) from error
    prepared = prepared.with_format(None)
    return [Tokens(list(ids), list(labels)) for ids, labels in zip(prepared["input_ids"], prepared["labels"])]


def lengths(examples: Dataset, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens of each example, prompt and answer together."""
    return [len(tokens.ids) for tokens in tokenize(examples, tokenizer)]


def check_tokens(examples: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None) -> TokenCheck:
    """Look at every example as tokens.

    Raises:
        DataError: an example has no trained token, no answer ends, or two in a row get identical tokens.
    """
    check = TokenCheck(tokenizer, max_length)
    for start in range(0, len(examples), 1000):
        part = examples.select(range(start, min(start + 1000, len(examples))))
        for number, (example, tokens) in enumerate(zip(part, tokenize(part, tokenizer)), start=start + 1):
            check.lengths.append(len(tokens.ids))
            check.add(example, tokens, f"example {number}")
    if problem := check.stop():
        raise DataError(problem)
    if check.masked:
        raise DataError(
            f"{check.masked[0]} has no trained token (and {len(check.masked) - 1} more). Its question fills max_length alone, "
            "or the chat template leaves its answer out: load_examples sets such rows aside."
        )
    return check


def ensure_chat_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Give the tokenizer of a base model a plain chat template; True if it had none. What is there is never replaced.

    Raises:
        DataError: the tokenizer has no end token, so an answer could not end.
    """
    if tokenizer.chat_template:
        return False
    if not tokenizer.eos_token:
        raise DataError(
            "This tokenizer has no end token, so no answer could end. Set tokenizer.eos_token to one of its special tokens."
        )
    starts = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    tokenizer.chat_template = ("{{ bos_token }}" if starts else "") + PLAIN_TEMPLATE
    return True


def show_tokens(
    example: dict[str, Any], tokenizer: PreTrainedTokenizerBase, max_length: int | None = None
) -> TokenView:
    """One example with its trained and masked tokens told apart: colored in a notebook, in brackets where it is printed.

    Args:
        example: prompt and completion messages, or {"text": ...}; an example of the loaded data.
        max_length: also shows which tokens would be cut.
    """
    from helpers.data.token_view import TokenView, pieces

    kept = {name: example[name] for name in ("prompt", "completion", "text") if example.get(name) is not None}
    tokens = tokenize(Dataset.from_list([kept]), tokenizer)[0]
    return TokenView(pieces(tokens.ids, [label != MASKED for label in tokens.labels], tokenizer, max_length))


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model: a name from the menu, a local folder, or a Hub id. Only for the bundled model, this fetches the weights too.

    Raises:
        DataError: there is no such model, it is gated, or no network.
    """
    from huggingface_hub.errors import GatedRepoError
    from transformers import AutoTokenizer

    from helpers.hub import how_to_open
    from helpers.registry import BUNDLED_MODEL, resolve
    from helpers.setup import hub_reachable
    from helpers.weights import fetch_weights

    model = resolve(name)
    try:
        if model == BUNDLED_MODEL:
            model = fetch_weights(model)
        in_folder = Path(model).is_dir()
        return AutoTokenizer.from_pretrained(
            Path(model) if in_folder else model, local_files_only=in_folder or not hub_reachable()
        )
    except Exception as error:  # no network, no such model, gated: each fails in its own way
        if isinstance(error.__cause__, GatedRepoError):
            raise DataError(how_to_open(model)) from None
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"No tokenizer for {name!r} ({why:.200}). Check the name and the network, or give a local folder."
        ) from None

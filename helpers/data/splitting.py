"""Texts that say nearly the same, and training and validation parts that have nothing in common.

    training, validation = split(examples, validation_share=0.15, seed=42)

Near duplicates share at least 70 % of their word pairs (Jaccard similarity). They are found without comparing every pair, by
MinHash and locality-sensitive hashing: each text gets a signature of 128 numbers, of which the expected share that agrees with
another text's equals their similarity; only texts that agree in all four numbers of one of 32 bands are compared. At 70 %, that
misses one pair in 6,000 ((1 - 0.7^4)^32); at 90 %, none. Time and memory grow with the number of texts.
"""

from __future__ import annotations

import random
import re
import zlib
from array import array
from collections import Counter
from collections.abc import Container, Iterable, Iterator
from typing import Any

import numpy as np
from datasets import Dataset

from helpers.config import noted
from helpers.data.issues import DataError, tell

SIMILAR = 0.7  # Jaccard similarity of word pairs from which two texts count as near duplicates
TOGETHER = 0.6  # similarity that keeps two texts in one part: lower, as the estimate may be off by 0.1
HASHES, BANDS = 128, 32
FEWEST_WORDS = 6  # shorter texts are near duplicates only if they are equal: one word is too much of them
BLOCK = 1024  # texts hashed at once, so that what is in between stays small
BOILERPLATE_SHARE, BOILERPLATE_TEXTS = 0.3, 30  # a word pair in more than both of these says nothing about two texts
ROUNDS = 24  # representatives that the members of one bucket are compared with
LABEL = 5  # an answer that more examples share is a label ("positive"), not a text whose leak would tell anything
Array = np.ndarray
Groups = list[list[int]]
WORD, ASCII_WORD = re.compile(r"\w+"), re.compile(rb"\w+")


def split(examples: Dataset, validation_share: float, seed: int) -> tuple[Dataset, Dataset]:
    """(training, validation): a seeded random split in which no question or answer of one part occurs in the other.

    Examples stay together if they come from one conversation, or if their question or answer is equal (ignoring case,
    spaces and punctuation) or nearly so. Only where that leaves too little to choose from, answers that many examples
    share may be on both sides. 10 to 20 % is a usual share; that another one comes out is printed.

    Examples that their source holds out (column `part`) are never trained on. Where there are any, they are the validation:
    the test part only if there is no validation part, and without what also stands in training.

    Raises DataError if all examples belong together.
    """
    if not isinstance(examples, Dataset):
        raise DataError(f"{type(examples).__name__} cannot be split. Give what load_examples returns.")
    parts = list(examples["part"]) if "part" in examples.column_names else ["train"] * len(examples)
    own = next((part for part in ("validation", "test") if part in parts), "")
    wanted = parts.count(own) or min(max(1, round(validation_share * len(examples))), max(1, len(examples) - 1))
    texts = {name: _near(examples, name) for name in ("prompt", "completion", "text") if name in examples.column_names}
    for strict in (True, False):
        groups = _groups(examples, texts, strict)
        validation = _chosen(groups, parts, own, wanted, seed)
        if wanted / 2 <= len(validation) <= 2 * wanted:
            break
    else:
        wanted_share = f"{wanted:,} of {len(examples):,} examples were to be held out, and {len(validation):,} are"
        tell(f"{wanted_share}: the others belong together, as near duplicates or by equal questions or answers.")
    training = sorted({index for index, part in enumerate(parts) if part == "train"} - set(validation))
    if not training or not validation:
        raise DataError(f"{len(examples)} examples that belong together cannot be split. Add examples that differ.")
    kept = examples.select_columns([name for name in examples.column_names if name not in ("group", "part")])
    examples = noted(kept, validation_share=validation_share, seed=seed)
    return examples.select(training), examples.select(sorted(validation))


def _chosen(groups: Groups, parts: list[str], own: str, wanted: int, seed: int) -> list[int]:
    """Validation: what the data holds out itself and training does not know, else groups drawn until no further one fits."""
    validation: list[int] = []
    random.Random(seed).shuffle(groups)
    for group in groups:
        if own and all(parts[index] != "train" for index in group):
            validation += [index for index in group if parts[index] == own]
        elif not own and len(validation) + len(group) <= wanted:
            validation += group
    return validation or (min(groups, key=len, default=[]) if not own else [])


def _near(examples: Dataset, part: str) -> tuple[array[int], Groups]:
    """Of the last message of each example: numbers that are equal for equal ones, and groups of near duplicates."""
    index = MinHashIndex()
    for some in examples.select_columns(part).with_format("arrow").iter(batch_size=BLOCK):
        for value in some[part].to_pylist():
            index.add(value[-1]["content"] if isinstance(value, list) else value)
    return index.exact, index.groups(TOGETHER).lists()


def _groups(examples: Dataset, texts: dict[str, tuple[array[int], Groups]], strict: bool) -> Groups:
    """Indices that must stay together. Not `strict`: an answer that many examples share does not bind them."""
    groups = UnionFind(len(examples))
    groups.join_equal(examples["group"] if "group" in examples.column_names else [])
    for part, (exact, near) in texts.items():
        repeated = Counter(exact if part == "completion" and not strict else [])
        labels = {key for key, count in repeated.items() if count > LABEL}
        for first, *others in near:
            for member in others if exact[first] not in labels else []:
                if exact[member] not in labels:
                    groups.join(member, first)
        groups.join_equal(exact, without=labels)
    return groups.lists()


def plain(text: str) -> str:
    """A text without case, punctuation and repeated spaces: what two equal texts share."""
    return " ".join(WORD.findall(text.lower()))


class UnionFind:
    """Which of n things belong together."""

    def __init__(self, count: int) -> None:
        self.parent = list(range(count))

    def root(self, index: int) -> int:
        """The first member of the group."""
        while self.parent[index] != index:
            self.parent[index] = self.parent[self.parent[index]]  # halve the path: stays fast for any order
            index = self.parent[index]
        return index

    def join(self, one: int, other: int) -> None:
        """Make one group of two."""
        one, other = self.root(one), self.root(other)
        self.parent[max(one, other)] = min(one, other)

    def join_equal(self, keys: Iterable[Any], without: Container[Any] = ()) -> None:
        """Join all things whose keys are equal, except for some keys."""
        first_with: dict[Any, int] = {}
        for index, key in enumerate(keys):
            if key not in without:
                self.join(index, first_with.setdefault(key, index))

    def lists(self) -> list[list[int]]:
        """All groups in the order of their first members, alone standing ones included."""
        groups: dict[int, list[int]] = {}
        for index in range(len(self.parent)):
            groups.setdefault(self.root(index), []).append(index)
        return list(groups.values())


def _numbers(text: str) -> Array:
    """A number for each word, in order."""
    text = text.lower()
    words = (
        ASCII_WORD.findall(text.encode())
        if text.isascii()
        else (word.encode("utf-8", "replace") for word in WORD.findall(text))
    )
    return np.fromiter(map(zlib.crc32, words), dtype=np.uint64)


class MinHashIndex:
    """Collects texts one by one; keeps four bytes for each of their word pairs."""

    def __init__(self) -> None:
        random = np.random.default_rng(2017)
        self._factors = random.integers(1, 2**62, HASHES, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
        self._offsets = random.integers(0, 2**62, HASHES, dtype=np.uint64)
        self._blocks: list[tuple[Array, Array]] = []  # pairs of some texts, and how many each of them has
        self._waiting: list[Array] = []  # numbers of the words of the next block's texts
        self.exact = array("q")  # a number for each text, equal for those that `plain` makes equal

    def add(self, *messages: str) -> list[int]:
        """One more text, of one or several messages. Returns a number for each message, as `exact` has for texts."""
        numbers = [_numbers(message) for message in messages]
        keys = [hash(own.tobytes()) if len(own) else hash(message) for own, message in zip(numbers, messages)]
        self.exact.append(keys[0] if len(keys) == 1 else hash(tuple(keys)))
        self._waiting.append(np.concatenate(numbers))
        if len(self._waiting) == BLOCK or len(self._waiting[-1]) > BLOCK:
            self._pair_up()
        return keys

    def _pair_up(self) -> None:
        """Make sorted word pairs of the texts that wait, each pair once."""
        lengths = np.array([len(own) for own in self._waiting])
        owner: Array = np.repeat(np.arange(len(lengths)), lengths)
        numbers = np.concatenate(self._waiting)
        mixed = numbers[:-1] * np.uint64(0x9E3779B97F4A7C15) ^ numbers[1:] * np.uint64(0xC2B2AE3D27D4EB4F)
        inside = (owner[:-1] == owner[1:]) & (lengths >= FEWEST_WORDS)[owner[:-1]]
        pairs = np.unique((owner[:-1].astype(np.uint64) << np.uint64(32) | mixed >> np.uint64(32))[inside])
        owned = np.bincount((pairs >> np.uint64(32)).astype(np.int64), minlength=len(lengths))
        self._blocks.append((pairs.astype(np.uint32), owned))
        self._waiting = []

    def groups(self, similar: float = SIMILAR) -> UnionFind:
        """Which of the texts added so far belong together, from this similarity on."""
        groups = UnionFind(len(self.exact))
        groups.join_equal(self.exact)
        if self._waiting:
            self._pair_up()
        is_first, common = np.array(groups.parent) == np.arange(len(self.exact)), self._common_pairs()
        signatures: Array = np.empty((len(self.exact), HASHES), np.uint32)
        chosen: list[int] = []
        start = 0
        for pairs, owned in self._blocks:
            owner: Array = np.repeat(np.arange(len(owned)), owned)
            telling = ~np.isin(pairs, common)
            owned = np.bincount(owner[telling], minlength=len(owned))
            compared = (owned >= FEWEST_WORDS - 1) & is_first[start : start + len(owned)]
            some = (start + np.flatnonzero(compared)).tolist()
            self._sign(pairs[telling & compared[owner]], owned[compared], signatures[len(chosen) :][: len(some)])
            chosen, start = chosen + some, start + len(owned)
        for band in range(0, HASHES, HASHES // BANDS):
            for one, other in _alike(signatures[: len(chosen)], slice(band, band + HASHES // BANDS), similar):
                groups.join(chosen[one], chosen[other])
        return groups

    def _common_pairs(self) -> Array:
        """Word pairs that many texts share ("Summarize this report: ..."): they say nothing about two of them."""
        pairs: Array = np.concatenate([np.empty(0, np.uint32), *(pairs for pairs, _ in self._blocks)])
        pairs.sort()
        most = int(max(BOILERPLATE_TEXTS, BOILERPLATE_SHARE * len(self.exact)))
        often = np.unique(pairs[::most])  # one that occurs more often than that is among these
        return often[np.searchsorted(pairs, often, "right") - np.searchsorted(pairs, often, "left") > most]

    def _sign(self, pairs: Array, owned: Array, signatures: Array) -> None:
        """Write for each text and hash function the smallest value over the text's word pairs."""
        starts = np.cumsum(owned) - owned
        every: Array = pairs.astype(np.uint64)
        for number in range(HASHES if len(owned) else 0):
            values = (every * self._factors[number] + self._offsets[number]) >> np.uint64(32)
            signatures[:, number] = np.minimum.reduceat(values, starts)


def _alike(signatures: Array, band: slice, wanted: float) -> Iterator[tuple[int, int]]:
    """Pairs of rows that agree in one band and, by all hashes, are similar enough."""
    columns = np.ascontiguousarray(signatures[:, band])
    keys = columns.view(np.dtype((np.void, columns.itemsize * columns.shape[1]))).ravel()
    order = np.argsort(keys, kind="stable")
    same = keys[order][1:] == keys[order][:-1]
    edges = np.flatnonzero(np.diff(np.concatenate(([0], same.astype(np.int8), [0]))))
    for first, last in zip(edges[::2], edges[1::2]):
        members = order[first : last + 1]
        for _ in range(ROUNDS):
            if len(members) < 2:
                break
            similar = (signatures[members] == signatures[members[0]]).mean(axis=1) >= wanted
            yield from ((int(members[0]), int(member)) for member in members[similar][1:])
            members = members[~similar]

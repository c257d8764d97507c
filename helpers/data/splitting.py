"""Texts that say nearly the same, and training and validation parts that have nothing in common.

    training, validation = split(examples, validation_share=0.15, seed=42)

Near duplicates are found without comparing every pair, by MinHash and locality-sensitive hashing. Two texts are near
duplicates if they share at least 70 % of their word pairs (Jaccard similarity). Each text gets a signature of 128
numbers, of which the expected share that agrees with another text's equals their similarity; only texts that agree in
all four numbers of one of 32 bands are compared. At 70 %, that misses one pair in 6,000 ((1 - 0.7^4)^32); at 90 %, none.
Time and memory grow with the number of texts.
"""

from __future__ import annotations

import random
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
from datasets import Dataset

from helpers.config import noted
from helpers.data.issues import DataError

SIMILAR = 0.7  # Jaccard similarity of word pairs from which two texts count as near duplicates
TOGETHER = 0.6  # similarity that keeps two texts in one part: lower, as the estimate may be off by 0.1
HASHES, BANDS = 128, 32
FEWEST_WORDS = 6  # shorter texts are near duplicates only if they are equal: one word is too much of them
LONGEST = 20_000  # characters of a text that are looked at
BLOCK = 1024  # texts hashed at once, so that what is in between stays small
BOILERPLATE_SHARE, BOILERPLATE_TEXTS = 0.3, 30  # a word pair in more than both of these says nothing about two texts
ROUNDS = 24  # representatives that the members of one bucket are compared with
LABEL = 5  # an answer that more examples share is a label ("positive"), not a text whose leak would tell anything
WORD = re.compile(r"\w+")
NOTHING: np.ndarray = np.empty(0, dtype=np.uint32)


def split(examples: Dataset, validation_share: float, seed: int) -> tuple[Dataset, Dataset]:
    """(training, validation): a seeded random split in which no question or answer of one part occurs in the other.

    Examples stay together if they come from one conversation, or if their question or answer is equal (ignoring case,
    spaces and punctuation) or nearly so. Only where that leaves too little to choose from, answers that many examples
    share may be on both sides. 10 to 20 % is a usual share.

    Raises:
        DataError: all examples belong together.
    """
    wanted = min(max(1, round(validation_share * len(examples))), max(1, len(examples) - 1))
    for strict in (True, False):
        groups = _groups(examples, strict)
        random.Random(seed).shuffle(groups)
        validation: list[int] = []
        for group in groups:
            if len(validation) + len(group) <= wanted:
                validation += group
        validation = validation or min(groups, key=len, default=[])
        if wanted / 2 <= len(validation) <= 2 * wanted:
            break
    training = sorted(set(range(len(examples))) - set(validation))
    if not training or not validation:
        raise DataError(f"{len(examples)} examples that belong together cannot be split. Add examples that differ.")
    kept = examples.select_columns([name for name in examples.column_names if name != "group"])
    examples = noted(kept, validation_share=validation_share, seed=seed)
    return examples.select(training), examples.select(sorted(validation))


def _groups(examples: Dataset, strict: bool) -> list[list[int]]:
    """Indices that must stay together. Not `strict`: an answer that many examples share does not bind them."""
    groups = UnionFind(len(examples))
    if "group" in examples.column_names:
        groups.join_equal(examples["group"])
    for part in (name for name in ("prompt", "completion", "text") if name in examples.column_names):
        texts = [value[-1]["content"] if isinstance(value, list) else value for value in examples[part]]
        keys = [plain(text) or text for text in texts]
        labels = set()
        if part == "completion" and not strict:
            labels = {key for key, count in Counter(keys).items() if count > LABEL}
        index = MinHashIndex()
        for text in texts:
            index.add(text)
        for group in index.groups(TOGETHER).lists():
            if keys[group[0]] not in labels:
                for member in group:
                    if keys[member] not in labels:
                        groups.join(member, group[0])
        groups.join_equal([number if key in labels else key for number, key in enumerate(keys)])
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

    def join_equal(self, keys: Any) -> None:
        """Join all things whose keys are equal."""
        first_with: dict[Any, int] = {}
        for index, key in enumerate(keys):
            self.join(index, first_with.setdefault(key, index))

    def lists(self) -> list[list[int]]:
        """All groups in the order of their first members, alone standing ones included."""
        groups: dict[int, list[int]] = {}
        for index in range(len(self.parent)):
            groups.setdefault(self.root(index), []).append(index)
        return list(groups.values())


@lru_cache(maxsize=500_000)
def _number(word: str) -> int:
    return zlib.crc32(word.encode("utf-8", "replace"))


class MinHashIndex:
    """Collects texts one by one; keeps four bytes for each of their word pairs."""

    def __init__(self) -> None:
        random = np.random.default_rng(2017)
        self._factors = random.integers(1, 2**62, HASHES, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
        self._offsets = random.integers(0, 2**62, HASHES, dtype=np.uint64)
        self._pairs: list[np.ndarray] = []
        self._exact: list[int] = []

    def add(self, text: str) -> None:
        """One more text."""
        numbers = [_number(word) for word in WORD.findall(text[:LONGEST].lower())]
        hashed = np.array(numbers, dtype=np.uint64)
        mixed = hashed[:-1] * np.uint64(0x9E3779B97F4A7C15) ^ hashed[1:] * np.uint64(0xC2B2AE3D27D4EB4F)
        pairs = np.unique((mixed >> np.uint64(32)).astype(np.uint32)) if len(numbers) >= FEWEST_WORDS else NOTHING
        self._pairs.append(pairs)
        self._exact.append(hash(tuple(numbers)) if numbers else hash(text))

    def groups(self, similar: float = SIMILAR) -> UnionFind:
        """Which of the texts added so far belong together, from this similarity on."""
        groups = UnionFind(len(self._exact))
        groups.join_equal(self._exact)
        pairs, common = self._pairs, self._common_pairs()
        if len(common):
            pairs = [own[~np.isin(own, common, assume_unique=True)] for own in pairs]
        chosen = [i for i, own in enumerate(pairs) if groups.root(i) == i and len(own) >= FEWEST_WORDS - 1]
        if len(chosen) < 2:
            return groups
        blocks = [chosen[start : start + BLOCK] for start in range(0, len(chosen), BLOCK)]
        signatures = np.concatenate([self._signatures([pairs[i] for i in block]) for block in blocks])
        for band in range(0, HASHES, HASHES // BANDS):
            for one, other in _alike(signatures, slice(band, band + HASHES // BANDS), similar):
                groups.join(chosen[one], chosen[other])
        return groups

    def _common_pairs(self) -> np.ndarray:
        """Word pairs that many texts share ("Summarize this report: ..."): they say nothing about two of them."""
        if len(self._pairs) <= BOILERPLATE_TEXTS:
            return NOTHING
        pairs, counts = np.unique(np.concatenate(self._pairs), return_counts=True)
        return pairs[counts > max(BOILERPLATE_TEXTS, BOILERPLATE_SHARE * len(self._pairs))]

    def _signatures(self, texts: list[np.ndarray]) -> np.ndarray:
        """For each text and hash function, the smallest value over the text's word pairs."""
        starts = np.cumsum([0] + [len(pairs) for pairs in texts[:-1]])
        every = np.concatenate(texts).astype(np.uint64)
        block: np.ndarray = np.empty((len(texts), HASHES), dtype=np.uint32)
        for number in range(HASHES):
            values = (every * self._factors[number] + self._offsets[number]) >> np.uint64(32)
            block[:, number] = np.minimum.reduceat(values, starts)
        return block


def _alike(signatures: np.ndarray, band: slice, wanted: float) -> Iterator[tuple[int, int]]:
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

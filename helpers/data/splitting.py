"""Texts that say nearly the same, found without comparing every pair (MinHash and locality-sensitive hashing).

    groups = near_duplicates(texts)         # [[0, 17], [4, 8, 15]]: indices of texts that belong together

Two texts are near duplicates if they share at least 70 % of their word pairs (Jaccard similarity). Each text gets a signature
of 128 numbers of which the expected share that agrees equals that similarity; only texts that agree in all four numbers of one of 32 bands are
compared. Of two texts at 70 %, that misses one in 6,000 pairs; at 90 %, none. Time and memory grow with the number of texts.

Training and validation parts that have nothing in common.
"""

from __future__ import annotations

import random
import re
import zlib
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
from datasets import Dataset

from helpers.data.issues import DataError

SIMILAR = 0.7  # Jaccard similarity of word pairs from which two texts count as near duplicates
HASHES, BANDS = 128, 32
FEWEST_WORDS = 6  # shorter texts are near duplicates only if they are equal: one word is too much of them
LONGEST = 20_000  # characters of a text that are looked at
BLOCK = 1024  # texts hashed at once, so that what is in between stays small
BOILERPLATE_SHARE, BOILERPLATE_TEXTS = 0.3, 30  # a word pair in more than both of these says nothing about two texts
ROUNDS = 24  # representatives that the members of one bucket are compared with
WORD = re.compile(r"\w+")
NOTHING = np.empty(0, dtype=np.uint32)


class UnionFind:
    """Union-find: which of n things belong together."""

    def __init__(self, count: int) -> None:
        self.parent = list(range(count))

    def root(self, index: int) -> int:
        while self.parent[index] != index:
            self.parent[index] = self.parent[self.parent[index]]  # halve the path: stays fast for any order
            index = self.parent[index]
        return index

    def join(self, one: int, other: int) -> None:
        one, other = self.root(one), self.root(other)
        if one != other:
            self.parent[max(one, other)] = min(one, other)

    def lists(self) -> list[list[int]]:
        """All groups in the order of their first members, alone standing ones included."""
        groups: dict[int, list[int]] = {}
        for index in range(len(self.parent)):
            groups.setdefault(self.root(index), []).append(index)
        return list(groups.values())


def plain(text: str) -> str:
    """A text without case, punctuation and repeated spaces: what two equal texts share."""
    return " ".join(WORD.findall(text.lower()))


def near_duplicates(texts: Iterable[str]) -> list[list[int]]:
    """UnionFind of two or more indices whose texts are near duplicates of each other."""
    signatures = MinHashIndex()
    for text in texts:
        signatures.add(text)
    return [group for group in signatures.groups().lists() if len(group) > 1]


class MinHashIndex:
    """Collects texts one by one; keeps four bytes for each of their word pairs."""

    def __init__(self) -> None:
        random = np.random.default_rng(2017)
        self._factors = random.integers(1, 2**62, HASHES, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
        self._offsets = random.integers(0, 2**62, HASHES, dtype=np.uint64)
        self._words: dict[str, int] = {}
        self._pairs: list[np.ndarray] = []
        self._exact: list[int] = []

    def add(self, text: str) -> None:
        words = WORD.findall(text[:LONGEST].lower())
        if len(self._words) > 500_000:  # keeps memory in bounds whatever the texts are
            self._words.clear()
        numbers = [self._number(word) for word in words]
        hashed = np.array(numbers, dtype=np.uint64)
        mixed = hashed[:-1] * np.uint64(0x9E3779B97F4A7C15) ^ hashed[1:] * np.uint64(0xC2B2AE3D27D4EB4F)
        self._pairs.append(
            np.unique((mixed >> np.uint64(32)).astype(np.uint32)) if len(words) >= FEWEST_WORDS else NOTHING
        )
        self._exact.append(hash(tuple(numbers)) if words else hash(text))

    def _number(self, word: str) -> int:
        number = self._words.get(word)
        if number is None:
            number = self._words[word] = zlib.crc32(word.encode("utf-8", "replace"))
        return number

    def groups(self, similar: float = SIMILAR) -> UnionFind:
        """Which of the texts added so far belong together, from this similarity on."""
        groups = UnionFind(len(self._exact))
        first_with: dict[int, int] = {}
        for index, key in enumerate(self._exact):
            groups.join(index, first_with.setdefault(key, index))
        common = self._common_pairs()
        chosen, signatures = [], []
        for start in range(0, len(self._exact), BLOCK):
            block = {}
            for index in range(start, min(start + BLOCK, len(self._exact))):
                pairs = self._pairs[index]
                if len(common):
                    pairs = pairs[~np.isin(pairs, common, assume_unique=True)]
                if first_with[self._exact[index]] == index and len(pairs) >= FEWEST_WORDS - 1:
                    block[index] = pairs
            if block:
                chosen += block
                signatures.append(self._signatures(list(block.values())))
        if len(chosen) > 1:
            indices, every = np.array(chosen), np.concatenate(signatures)
            for start in range(0, HASHES, HASHES // BANDS):
                self._compare(groups, indices, every, slice(start, start + HASHES // BANDS), similar)
        return groups

    def _common_pairs(self) -> np.ndarray:
        """Word pairs of a boilerplate ("Summarise this report: ...") that many texts share: they say nothing about two of them."""
        if len(self._pairs) <= BOILERPLATE_TEXTS:
            return NOTHING
        pairs, counts = np.unique(np.concatenate(self._pairs), return_counts=True)
        return pairs[counts > max(BOILERPLATE_TEXTS, BOILERPLATE_SHARE * len(self._pairs))]

    def _signatures(self, texts: list[np.ndarray]) -> np.ndarray:
        """For each text and hash function, the smallest value over the text's word pairs."""
        starts = np.cumsum([0] + [len(pairs) for pairs in texts[:-1]])
        every = np.concatenate(texts).astype(np.uint64)
        block = np.empty((len(texts), HASHES), dtype=np.uint32)
        for number in range(HASHES):
            values = (every * self._factors[number] + self._offsets[number]) >> np.uint64(32)
            block[:, number] = np.minimum.reduceat(values, starts)
        return block

    @staticmethod
    def _compare(groups: UnionFind, chosen: np.ndarray, signatures: np.ndarray, band: slice, wanted: float) -> None:
        """Join the texts that agree in one band and, by all hashes, are similar enough."""
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
                for member in members[similar][1:]:
                    groups.join(int(chosen[members[0]]), int(chosen[member]))
                members = members[~similar]


NEAR = (
    0.6  # similarity that keeps two texts together: below the 0.7 that is reported, as the estimate may be off by 0.1
)
LABEL = 5  # an answer that more examples share is a label ("positive"), not a text whose leak would tell anything


def split(examples: Dataset, validation_share: float, seed: int) -> tuple[Dataset, Dataset]:
    """(training, validation): a seeded random split in which no question or answer of one part occurs in the other.

    Examples stay together if they come from one conversation, or if their question or answer is equal (ignoring case, spaces and
    punctuation) or nearly so. Only where that leaves too little to choose from, answers that many examples share may be on both sides.
    10 to 20 % is a usual share.
    """
    wanted = min(max(1, round(validation_share * len(examples))), max(1, len(examples) - 1))
    for strict in (True, False):
        groups = _groups(examples, strict)
        random.Random(seed).shuffle(groups)
        validation: list[int] = []
        for group in groups:
            if len(validation) + len(group) <= wanted:
                validation += group
        if not validation:
            validation = min(groups, key=len, default=[])
        if wanted / 2 <= len(validation) <= 2 * wanted:
            break
    held_out = set(validation)
    training = [index for index in range(len(examples)) if index not in held_out]
    if not training or not validation:
        raise DataError(
            f"{len(examples)} examples cannot be split into training and validation parts. Add examples that differ."
        )
    examples = examples.remove_columns([name for name in ("group",) if name in examples.column_names])
    return examples.select(training), examples.select(sorted(validation))


def _groups(examples: Dataset, strict: bool) -> list[list[int]]:
    """Indices that must stay together. Not `strict`: an answer that many examples share does not bind them."""
    groups = UnionFind(len(examples))
    first_with: dict[tuple[str, Any], int] = {}
    if "group" in examples.column_names:
        for index, group in enumerate(examples["group"]):
            groups.join(index, first_with.setdefault(("group", group), index))
    for part in (name for name in ("prompt", "completion", "text") if name in examples.column_names):
        signatures = MinHashIndex()
        keys = []
        for value in examples[part]:
            text = value[-1]["content"] if isinstance(value, list) else value
            keys.append(plain(text) or text)
            signatures.add(text)
        often = (
            {key for key, count in Counter(keys).items() if count > LABEL}
            if part == "completion" and not strict
            else set()
        )
        for group in signatures.groups(NEAR).lists():
            for index in group:
                if keys[index] not in often:
                    groups.join(index, group[0] if keys[group[0]] not in often else index)
        for index, key in enumerate(keys):
            if key not in often:
                groups.join(index, first_with.setdefault((part, key), index))
    return groups.lists()

"""Near duplicates: found where words differ, not where texts merely share a form; and never by comparing all pairs."""

import itertools
import random
import re
import time

from helpers.data.splitting import SIMILAR, MinHashIndex

WORDS = [f"{a}{b}{c}" for a in "bdfgk" for b in "aeiou" for c in ("n", "st", "rl", "m", "p")]


def make(count, words=40, seed=0):
    chosen = random.Random(seed)
    return [" ".join(chosen.choices(WORDS, k=words)) for _ in range(count)]


def near_duplicates(texts):
    """The groups of two or more."""
    index = MinHashIndex()
    for text in texts:
        index.add(text)
    return [group for group in index.groups().lists() if len(group) > 1]


def similarity(one, other):
    a, b = ({tuple(pair) for pair in itertools.pairwise(re.findall(r"\w+", text.lower()))} for text in (one, other))
    return len(a & b) / len(a | b)


def test_texts_that_differ_in_a_word_or_in_form_are_near_duplicates():
    texts = make(50)
    texts[7] = texts[3].replace(texts[3].split()[20], "otherwise", 1)
    texts[9] = texts[3].upper() + "!"
    assert near_duplicates(texts) == [[3, 7, 9]]


def test_short_texts_are_duplicates_only_if_they_are_equal():
    assert near_duplicates(
        ["What is 3 plus 3?", "What is 4 plus 4?", "what is 3, plus 3", "", "", "日本", "日本。"]
    ) == [
        [0, 2],
        [3, 4],
        [5, 6],
    ]


def test_a_shared_introduction_does_not_make_texts_alike():
    introduction = (
        "Read the following report of a clinical trial with care and then summarize it for a patient in plain words: "
    )
    assert near_duplicates(introduction + text for text in make(200, words=12)) == []


def test_every_pair_that_is_similar_is_found_and_no_other(say):
    """Against the exact similarity of all pairs, on texts with 0 to 12 of 40 words changed."""
    chosen, texts = random.Random(1), make(150)
    for index in range(150):
        words = texts[index].split()
        for position in chosen.sample(range(40), chosen.randint(0, 12)):
            words[position] = f"other{chosen.randrange(10**6)}"
        texts.append(" ".join(words))
    together = {pair for group in near_duplicates(texts) for pair in itertools.combinations(group, 2)}
    exact = {pair: similarity(texts[pair[0]], texts[pair[1]]) for pair in itertools.combinations(range(300), 2)}
    clear = {pair for pair, value in exact.items() if value >= SIMILAR + 0.12}
    assert clear <= together and not {pair for pair in together if exact[pair] < SIMILAR - 0.15}
    near = {pair for pair, value in exact.items() if value >= SIMILAR}
    say(
        f"near duplicates: {len(near & together)} of {len(near)} pairs at {SIMILAR:.0%} similarity found, {len(together - near)} below it"
    )


def test_time_grows_with_the_number_of_texts_and_not_with_its_square(say):
    seconds = {}
    for count in (4_000, 16_000):
        texts = make(count)
        start = time.perf_counter()
        near_duplicates(texts)
        seconds[count] = time.perf_counter() - start
    say(f"near duplicates: {', '.join(f'{count:,} texts in {taken:.2f} s' for count, taken in seconds.items())}")
    assert seconds[16_000] < 8 * seconds[4_000] + 1  # four times the texts; the square would be 16 times


def test_many_equal_and_many_alike_texts_take_no_longer():
    base = make(1, words=60)[0]
    start = time.perf_counter()
    alike = near_duplicates([base] * 10_000 + [f"{base} {n}" for n in range(10_000)])
    assert time.perf_counter() - start < 20
    assert alike[0][:2] == [0, 1]

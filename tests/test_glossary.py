"""The glossary is in order, explains every word once, and knows which lesson uses it first. Needs no torch."""

import re
from pathlib import Path

import pytest

from tools import glossary
from tools.course import ROOT, lessons, prose, read
from tools.glossary import ENTRY, first_lesson, ordered

# What the specification names; the lessons may use more.
WORDS = """absmax, accumulation, adapter, alpha, batch, bf16, block, bootstrap interval, chat template, checkpoint, checkpointing, codebook,
cross-entropy, double quantization, early stopping, epoch, forgetting, fp16, GGUF, gradient, held-out, learning rate, LoRA, loss, mask,
merge, NF4, optimizer state, overfitting, p value, packing, perplexity, QLoRA, rank, scheduler, seed, sequence length, step,
target modules, token, validation loss, warmup, weight decay"""


# Bold in the lessons, but no technical words: exercises, things to note, and forms of words that have an entry.
NO_WORDS = """bold, easy, medium, hard, time, memory, all, merged, merging, messages, plain text, validation, quantized,
gradient accumulation, gradient checkpointing, same validation letters"""


def listed(words: str) -> set[str]:
    return set(re.split(r",\s+", words))


def entries() -> list[tuple[str, str]]:
    paragraphs = (ROOT / "notebooks" / "GLOSSARY.md").read_text(encoding="utf-8").strip().split("\n\n")
    return [(match[1], match[2]) for match in map(ENTRY.fullmatch, paragraphs) if match]


def test_the_glossary_is_in_order_and_knows_the_lessons():
    assert glossary.main(["--check"]) == 0


def test_every_word_of_the_course_is_there_once_in_a_sentence_or_two():
    words = [word for word, _ in entries()]
    assert len(words) == len(set(words))
    assert listed(WORDS) <= set(words)
    for word, text in entries():
        assert 30 < len(text) < 320 and text.endswith("."), word
        assert len(re.findall(r"[.?!](?:\s|$)", text)) <= 3, word


@pytest.mark.parametrize("lesson", lessons(), ids=lambda path: path.stem)
def test_the_words_that_a_lesson_prints_bold_are_explained(lesson):
    text = "\n".join(cell.source for cell in prose(read(lesson)))
    bold = {word.strip(".:").casefold() for word in re.findall(r"\*\*(.+?)\*\*", text)}
    words = {word for word in bold if word.count(" ") <= 2 and not re.search(r"\d{2}|,", word)} - listed(NO_WORDS)
    known = {word.casefold() for word, _ in entries()}
    assert {word for word in words if word not in known and word.removesuffix("s") not in known} == set()


def test_words_are_found_where_they_are_used_and_only_there():
    one, two = Path("01_a.ipynb"), Path("02_b.ipynb")
    texts = {one: "A stepladder, subtokens; lora in code.", two: "Two steps, one Token each. LoRA, and a p value."}
    found = [first_lesson(word, texts) for word in ("step", "token", "LoRA", "p value", "rank")]
    assert found == [two, two, two, two, None]
    before = "# Glossary\n\n**token**: A piece.\n\n**LoRA**: Thin. First in [lesson 09](09_gone.ipynb).\n"
    first = "First in [lesson 02](02_b.ipynb)."
    assert ordered(before, texts) == f"# Glossary\n\n**LoRA**: Thin. {first}\n\n**token**: A piece. {first}\n"

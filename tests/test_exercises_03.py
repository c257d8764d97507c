"""The checks of lesson 03 tell right from wrong, whatever they are given; its table shows what was damaged."""

import string
from types import SimpleNamespace

import pytest

from notebooks.lessons.lesson_03 import check_leaks, check_max_length, check_template, side_by_side_answers

LENGTHS = [40] * 90 + [70] * 6 + [100, 120, 140, 300]
MESSAGES = [{"role": "user", "content": "Where is my parcel?"}, {"role": "assistant", "content": "On its way."}]
TOKENIZER = SimpleNamespace(
    apply_chat_template=lambda messages, tokenize: "".join(
        f"<{message['role']}>{message['content']}</s>\n" for message in messages
    )
)


@pytest.mark.parametrize(
    "answer, verdict",
    [
        (96, "Right"),
        (96.0, "Right"),
        (None, "Your turn"),
        (64, "Not yet: 64 tokens hold 90.0%"),
        (128, "Not yet: 128 is enough"),
        (95, "Not yet: 95 is no multiple"),
        (0, "Not yet"),
        (-32, "Not yet"),
        (True, "Not yet"),
        ("96", "Not yet"),
        ([96], "Not yet"),
        (float("nan"), "Not yet"),
        (float("inf"), "Not yet"),
        (10**9, "Not yet"),
    ],
)
def test_max_length(said, answer, verdict):
    assert said(check_max_length, answer, LENGTHS).startswith(verdict)


def test_template(said):
    right = TOKENIZER.apply_chat_template(MESSAGES, tokenize=False)
    assert said(check_template, right, MESSAGES, TOKENIZER).startswith("Right")
    assert said(check_template, None, MESSAGES, TOKENIZER).startswith("Your turn")
    assert "white space" in said(check_template, right.strip(), MESSAGES, TOKENIZER)
    assert "of the assistant" in said(check_template, right.replace("On", "on"), MESSAGES, TOKENIZER)
    line = said(check_template, right.replace("</s>", "", 1), MESSAGES, TOKENIZER)
    assert (
        f"first {right.index('</s>')} characters" in line and "</s>" not in line
    )  # no more is given away than what was right
    for wrong in ("", "x", 3, [right], right + right, right.encode()):
        assert said(check_template, wrong, MESSAGES, TOKENIZER).startswith("Not yet")


def plain(text):
    return " ".join(text.lower().translate(str.maketrans("", "", string.punctuation)).split())


def finder(form):
    return lambda training, validation: [
        n for n, text in enumerate(validation) if form(text) in {form(known) for known in training}
    ]


@pytest.mark.parametrize(
    "function, line",
    [
        (finder(plain), "Right"),
        (lambda training, validation: {n for n in finder(plain)(training, validation)}, "Right"),
        (finder(lambda text: text), "Not yet: the same question in other capitals"),
        (finder(str.lower), "Not yet: with other punctuation"),
        (finder(lambda text: text.lower().strip(" ?!")), "Not yet: spaces and line breaks"),
        (lambda training, validation: list(range(len(validation))), "Not yet: a question that stands in both parts"),
        (lambda training, validation: [], "Not yet: a question that stands in both parts"),
        (lambda training, validation: None, "Not yet: your function"),
        (lambda training, validation: "all", "Not yet: your function"),
        (lambda training, validation: 1 / 0, "Not yet: your function"),
        (lambda: [], "Not yet: your function"),
        (True, "Not yet: the answer is the function"),
        (None, "Your turn"),
    ],
)
def test_leaks(said, function, line):
    assert said(check_leaks, function).startswith(line)


def test_the_table_shows_only_answers_that_were_damaged():
    clean = [{"completion": [{"role": "assistant", "content": text}]} for text in ("one\ntwo", "three", "four")]
    noisy = [{"completion": [{"role": "assistant", "content": text}]} for text in ("one\nowt", "three", "fuor")]
    table = side_by_side_answers(clean, noisy, rows=5)
    assert table.values.tolist() == [["one / two", "one / owt"], ["four", "fuor"]]
    assert len(side_by_side_answers(clean, noisy, rows=1)) == 1

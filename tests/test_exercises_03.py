"""The checks of lesson 03 tell right from wrong, whatever they are given; its table shows what was damaged."""

import string
from functools import partial
from types import SimpleNamespace

from notebooks.lessons.lesson_03 import check_leaks, check_max_length, check_template, side_by_side_answers
from tests.exercises import answers

LENGTHS = [40] * 90 + [70] * 6 + [100, 120, 140, 300]
MESSAGES = [{"role": "user", "content": "Where is my parcel?"}, {"role": "assistant", "content": "On its way."}]
TEMPLATE = "<user>Where is my parcel?</s>\n<assistant>On its way.</s>\n"
TOKENIZER = SimpleNamespace(apply_chat_template=lambda messages, tokenize: TEMPLATE)


def plain(text):
    return " ".join(text.lower().translate(str.maketrans("", "", string.punctuation)).split())


def finder(form, kind=list):
    return lambda training, validation: kind(
        n for n, text in enumerate(validation) if form(text) in {form(known) for known in training}
    )


@answers(
    {
        partial(check_max_length, token_lengths=LENGTHS): [
            (96, "Right"),
            (96.0, "Right"),
            (64, "Not yet: 64 tokens hold 90.0%"),
            (128, "Not yet: 128 is enough"),
            (95, "Not yet: 95 is no multiple"),
            (0, "no multiple"),
            (-32, "no multiple"),
            (10**9, "so is less"),
        ],
        partial(check_template, messages=MESSAGES, tokenizer=TOKENIZER): [
            (TEMPLATE, "Right"),
            (TEMPLATE.strip(), "white space"),
            (TEMPLATE.replace("On", "on"), "Not yet: the first 41 of 57 characters are right, up to"),
            # No more is given away than what was right.
            (TEMPLATE.replace("</s>", "", 1), "up to ...'>Where is my parcel?'. Look at what comes next"),
            (TEMPLATE[:30], "and there yours ends"),
            (TEMPLATE + TEMPLATE, "goes on"),
            ("", "first 0 of"),
            (["x"], "one text"),
        ],
        check_leaks: [
            (finder(plain), "Right"),
            (finder(plain, set), "Right"),
            (finder(lambda text: text), "Not yet: the same question in other capitals"),
            (finder(str.lower), "Not yet: with other punctuation"),
            (finder(lambda text: text.lower().strip(" ?!")), "Not yet: spaces and line breaks"),
            (
                lambda training, validation: list(range(len(validation))),
                "Not yet: a question that stands in both parts",
            ),
            (lambda training, validation: [], "Not yet: a question that stands in both parts"),
            (lambda training, validation: "all", "Not yet: your function returns 'all'"),
        ],
    }
)
def test_answers(said, check, answer, words):
    said(check, answer, words)


def test_the_table_shows_only_answers_that_were_damaged():
    clean = [{"completion": [{"role": "assistant", "content": text}]} for text in ("one\ntwo", "three", "four")]
    noisy = [{"completion": [{"role": "assistant", "content": text}]} for text in ("one\nowt", "three", "fuor")]
    table = side_by_side_answers(clean, noisy, rows=5)
    assert table.values.tolist() == [["one / two", "one / owt"], ["four", "fuor"]]
    assert len(side_by_side_answers(clean, noisy, rows=1)) == 1

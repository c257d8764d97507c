import itertools
import json
import re

import pytest

from helpers.data import DataError, load_examples, split, to_messages
from helpers.evaluation import follows_house_style


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_rows_become_prompt_and_completion_messages(tmp_path):
    rows = [
        {"instruction": " Ask ", "input": "Context", "output": "Answer"},
        {"instruction": "Only this", "input": "", "output": "Yes"},
    ]
    examples = load_examples(write(tmp_path / "a.jsonl", rows))
    assert examples[0] == {
        "prompt": [{"role": "user", "content": "Ask\n\nContext"}],
        "completion": [{"role": "assistant", "content": "Answer"}],
    }
    assert examples[1]["prompt"][0]["content"] == "Only this"
    assert to_messages({"instruction": "x", "output": "y"})["prompt"][0]["content"] == "x"


def test_a_missing_file_names_the_path_that_was_looked_at(tmp_path):
    with pytest.raises(DataError, match=re.escape(str(tmp_path / "nothing.jsonl"))):
        load_examples(tmp_path / "nothing.jsonl")


@pytest.mark.parametrize(
    ("content", "message"),
    [('{"question": "a", "answer": "b"}\n', "no column instruction, output; found question, answer"),
     ('{"instruction": "a", "output": "b"}\n{"instruction": "a", "output": " "}\n', "example 2: 'output' is empty"),
     ('{"instruction": "a", "output": "b"}\nnot json\n', "not readable as JSON lines"),
     ("", "a.jsonl")],
)  # fmt: skip
def test_bad_files_get_one_sentence(tmp_path, content, message):
    file = tmp_path / "a.jsonl"
    file.write_text(content)
    with pytest.raises(DataError, match=message):
        load_examples(file)


def test_the_split_is_seeded_and_disjoint(tmp_path, alpaca_rows):
    examples = load_examples(write(tmp_path / "a.jsonl", alpaca_rows))
    training, validation = split(examples, 0.25, seed=1)
    again = split(examples, 0.25, seed=1)
    other = split(examples, 0.25, seed=2)
    assert (len(training), len(validation)) == (18, 6)
    assert list(validation) == list(again[1]) and list(validation) != list(other[1])
    assert not {str(x["prompt"]) for x in training} & {str(x["prompt"]) for x in validation}


def test_equal_questions_or_answers_never_straddle_the_split(tmp_path):
    rows = [{"instruction": f"Question {n // 3}!", "output": f"Answer {n // 2}"} for n in range(60)]
    training, validation = split(load_examples(write(tmp_path / "a.jsonl", rows)), 0.3, seed=0)
    assert len(training) + len(validation) == 60
    for part in ("prompt", "completion"):
        assert not {x[part][0]["content"] for x in training} & {x[part][0]["content"] for x in validation}


def test_too_few_examples_to_split_is_said(tmp_path):
    with pytest.raises(DataError, match="cannot be split"):
        split(load_examples(write(tmp_path / "a.jsonl", [{"instruction": "a", "output": "b"}])), 0.15, seed=0)


# ------------------------------------------------------------------------------------------- the shipped sample


@pytest.fixture(scope="module")
def support_rows(root):
    lines = (root / "data_samples/customer_support.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_the_sample_has_500_examples_in_house_style(support_rows):
    assert len(support_rows) >= 500
    assert all(list(row) == ["instruction", "input", "output"] for row in support_rows)
    assert all(follows_house_style(row["output"]) for row in support_rows)


def test_the_sample_varies_and_the_data_card_says_how_much(support_rows, root):
    """Token-set Jaccard similarity of every pair of outputs; the card must quote the highest one."""
    words = [set(re.findall(r"\w+", row["output"].lower())) for row in support_rows]
    highest = max(len(a & b) / len(a | b) for a, b in itertools.combinations(words, 2))
    assert highest <= 0.8
    card = (root / "data_samples/README.md").read_text(encoding="utf-8")
    assert f"{highest:.2f}" in card and f"{len(support_rows)} examples" in card


def test_the_sample_holds_nothing_that_looks_private(support_rows):
    assert not [row for row in support_rows if re.search(r"@|https?:|www\.|\d{7,}", json.dumps(row))]


BODY = "I hear you: a.\nWe will: b.\nYou can: c."
SIGNATURE = "Warmly, Wren at Copperleaf"


@pytest.mark.parametrize(
    "broken",
    [
        "",
        f"Hello there,\n{BODY}",
        f"Sure! Hello there,\n{BODY}\n{SIGNATURE}",
        f"Hello there,\n\n{BODY}\n{SIGNATURE}",
        f"Hello there,\n{BODY}\n{SIGNATURE}\nP.S. more",
        f"Hello there,\nWe will: b.\nI hear you: a.\nYou can: c.\n{SIGNATURE}",
        f"Hello there,\nI hear you: \nWe will: b.\nYou can: c.\n{SIGNATURE}",
    ],
)
def test_the_style_check_can_fail(broken):
    assert follows_house_style(f"Hello there,\n{BODY}\n{SIGNATURE}")
    assert not follows_house_style(broken)

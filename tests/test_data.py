"""The front door: load, split, the command line, and what the shipped sample promises."""

import itertools
import json
import os
import re
import subprocess
import sys

import pytest

from helpers.data import DataError, load_examples, split
from helpers.data.__main__ import main
from helpers.data.splitting import MinHashIndex
from helpers.metrics import follows_house_style


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def load(path, rows):
    return load_examples(write(path, rows), rejected=None)


def texts(examples, part):
    return {example[part][-1]["content"] for example in examples}


def test_a_missing_file_names_the_path_that_was_looked_at(tmp_path):
    with pytest.raises(DataError, match=re.escape(str(tmp_path / "nothing.jsonl"))):
        load_examples(tmp_path / "nothing.jsonl")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"question": "a", "category": "b"}\n', r"no column for the answer; found question, category \(line 1\)"),
        ('\n{"instruction": "a", "output": " "}\n', r"'output' is empty \(line 2\)"),
        ("not json\n", r"not readable as JSON.*column 1"),
        ("", "a.jsonl is empty"),
    ],
)
def test_bad_files_get_one_sentence(tmp_path, content, message):
    file = tmp_path / "a.jsonl"
    file.write_text(content)
    with pytest.raises(DataError, match=message):
        load_examples(file, rejected=None)


def test_rows_that_cannot_be_used_are_set_aside_and_said_in_one_line(tmp_path, capsys):
    rows = [{"instruction": question, "output": answer} for question, answer in ("ab", ("c", ""), "de")]
    examples = load_examples(write(tmp_path / "a.jsonl", rows), rejected=tmp_path / "rejected.jsonl")
    said = capsys.readouterr().out
    assert len(examples) == 2 and said.count("\n") == 1
    assert f"1 of 3 rows set aside (see {tmp_path / 'rejected.jsonl'})" in said
    saved = json.loads((tmp_path / "rejected.jsonl").read_text())
    assert saved["line"] == 2 and saved["record"] == rows[1] and "'output' is empty" in saved["reason"]


def test_csv_with_quotes_commas_and_line_breaks_round_trips_exactly(tmp_path):
    import csv

    fields = ['He said "no", twice', "a,b;c\td|e", "two\nlines", "carriage\r\nreturn", "'single'", '"', ","]
    fields += ["NULL", "007", "=1+1", "é€🌿"]
    rows = [(f"Question {n}: {field}", f"{field} answer {n}") for n, field in enumerate(fields)]
    for name, delimiter in (("a.csv", ","), ("b.csv", ";"), ("c.tsv", "\t")):
        with (tmp_path / name).open("w", newline="", encoding="utf-8") as stream:
            csv.writer(stream, delimiter=delimiter).writerows([("question", "answer"), *rows])
        examples = load_examples(tmp_path / name)
        assert [(x["prompt"][0]["content"], x["completion"][0]["content"]) for x in examples] == rows


# ------------------------------------------------------------------------------------------------ the split


def test_the_split_is_seeded_and_disjoint(tmp_path, alpaca_rows):
    examples = load(tmp_path / "a.jsonl", alpaca_rows)
    training, validation = split(examples, 0.25, seed=1)
    again = split(examples, 0.25, seed=1)
    other = split(examples, 0.25, seed=2)
    assert (len(training), len(validation)) == (18, 6)
    assert list(validation) == list(again[1]) and list(validation) != list(other[1])
    assert not {str(x["prompt"]) for x in training} & {str(x["prompt"]) for x in validation}
    assert training.column_names == validation.column_names == ["prompt", "completion"]


def test_equal_questions_or_answers_never_straddle_the_split(tmp_path):
    rows = [{"instruction": f"Question {n // 3}!", "output": f"Answer {n // 2}"} for n in range(60)]
    examples = load(tmp_path / "a.jsonl", rows)
    training, validation = split(examples, 0.3, seed=0)
    assert len(training) + len(validation) == len(examples) == 40  # of 60: the others are exact duplicates
    for part in ("prompt", "completion"):
        assert not texts(training, part) & texts(validation, part)


def test_near_duplicates_never_straddle_the_split(tmp_path):
    rows, subjects = [], "gate kettle spade lamp basket rake bench vase hose ladder clock stool"
    for number, subject in enumerate(subjects.split()):
        for politeness in ("please", "kindly", "today"):
            question = f"My {subject} number {number} came with a crack on its left side, so {politeness} tell me what I can do about {subject} {number}"
            answer = f"We are sorry about the {subject}; a new {subject} leaves store {number} {politeness} and reaches your {subject} shelf in {number} days"
            rows.append({"instruction": question, "output": answer})
    examples = load(tmp_path / "a.jsonl", rows)
    for seed in range(5):
        training, validation = split(examples, 0.2, seed)
        index = MinHashIndex()
        for example in [*training, *validation]:
            index.add(example["prompt"][0]["content"])
        for group in index.groups().lists():
            assert len({member < len(training) for member in group}) == 1
        assert 3 <= len(validation) <= 7


def test_a_conversation_stays_whole(tmp_path):
    turns = [(turn, role) for turn in range(3) for role in ("user", "assistant")]
    talks = [[{"role": role, "content": f"{role} {n} {turn}"} for turn, role in turns] for n in range(20)]
    examples = load(tmp_path / "a.jsonl", [{"messages": talk} for talk in talks])
    assert len(examples) == 60 and sorted(set(examples["group"])) == list(range(20))
    training, validation = split(examples, 0.2, seed=3)
    talks = [{x["prompt"][0]["content"].split()[1] for x in part} for part in (training, validation)]
    assert not talks[0] & talks[1] and len(validation) == 12


def test_labels_may_be_on_both_sides(tmp_path):
    rows = [{"question": f"Review {n} of the film about {n * 7}", "answer": ["good", "bad"][n % 2]} for n in range(100)]
    training, validation = split(load(tmp_path / "a.jsonl", rows), 0.2, seed=0)
    assert len(validation) == 20 and texts(training, "completion") == texts(validation, "completion") == {"good", "bad"}
    assert not texts(training, "prompt") & texts(validation, "prompt")


def test_plain_text_is_split_too(tmp_path):
    rows = [{"text": f"This is text {n // 2} of a few{'.' * (n % 2)}"} for n in range(20)]
    examples = load(tmp_path / "a.jsonl", rows)
    training, validation = split(examples, 0.2, seed=0)
    assert training.column_names == ["text"] and len(validation) == 4
    assert not {x["text"].strip(".") for x in training} & {x["text"].strip(".") for x in validation}


def test_what_cannot_be_split_as_asked_is_said(tmp_path, capsys):
    for wrong in (load(tmp_path / "a.jsonl", [{"instruction": "a", "output": "b"}]), [{"instruction": "a"}], None, 5):
        with pytest.raises(DataError, match="cannot be split"):
            split(wrong, 0.15, seed=0)
    kinds = "one two three four five six seven eight nine {}", "ten eleven twelve thirteen fourteen fifteen sixteen {}"
    rows = [{"instruction": kinds[n % 2].format(n), "output": f"Result {n}"} for n in range(30)]
    assert len(split(load(tmp_path / "a.jsonl", rows), 0.15, seed=0)[1]) == 15
    assert "4 of 30 examples were to be held out, and 15 are" in capsys.readouterr().out


def test_questions_about_one_long_document_are_told_apart(tmp_path):
    document = " ".join(f"word{n * n}" for n in range(3000))
    rows = [{"question": f"{document} Is {n} in it?", "answer": f"It is {n}."} for n in range(60)]
    assert len(document) > 21_000 and len(split(load(tmp_path / "a.jsonl", rows), 0.2, seed=0)[1]) == 12


# ------------------------------------------------------------------------------------------------ command line


def test_the_command_line_prints_the_report_and_exits_0_only_if_training_could_start(root, tmp_path):
    how = {"cwd": root, "env": os.environ | {"PYTHONIOENCODING": "ascii"}, "capture_output": True, "text": True}

    def run(*arguments):
        return subprocess.run([sys.executable, "-m", "helpers.data", *arguments], **how, timeout=120)

    done = run("data_samples/customer_support.jsonl")
    assert done.returncode == 0 and "tokens were not checked" in done.stdout
    assert "574 rows read, 574 kept, 0 set aside" in done.stdout
    bad = run(str(write(tmp_path / "bad é.jsonl", [{"a": 1}])))  # on a console that has ASCII only
    assert bad.returncode == 1 and "Training cannot start" in bad.stdout and "Traceback" not in bad.stderr


def test_the_command_line_checks_tokens_with_a_model(root, tiny_model, tmp_path, capsys):
    sample = str(root / "data_samples/customer_support.jsonl")
    model, rejected = ["--model", str(tiny_model)], tmp_path / "r.jsonl"
    assert main([sample, *model, "--max-length", "500", "--rejected", str(rejected)]) == 0 and rejected.exists()
    said = capsys.readouterr().out
    assert "answers longer than max_length" in said and "max_length 500 covers" in said
    assert main([sample, *model, "--max-length", "500", "--truncate"]) == 0
    assert "574 kept" in capsys.readouterr().out
    assert main([sample, *model, "--max-length", "10", "--truncate"]) == 1
    assert main([sample, "--model", str(tmp_path / "no model")]) == 1


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

"""The data samples are what their cards say."""

import csv
import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations

import pandas as pd
import pytest

from helpers.data import load_examples, split

SECONDS = 10  # for one function and its assertions


def rows(root, name):
    return [json.loads(line) for line in (root / "data_samples" / name).read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    "name, read, examples",
    [
        ("customer_support.jsonl", 574, 574),
        ("python_functions.jsonl", 315, 315),
        ("clinical_summaries.csv", 210, 210),
        ("chat_tutor.jsonl", 160, None),
    ],
)
def test_each_sample_loads_whole_and_splits_without_overlap(root, tmp_path, capsys, name, read, examples):
    loaded = load_examples(root / "data_samples" / name, rejected=tmp_path / "rejected.jsonl")
    assert capsys.readouterr().out == "" and not (tmp_path / "rejected.jsonl").exists()
    if examples is None:  # one for each of the tutor's replies
        examples = sum(message["role"] == "assistant" for row in rows(root, name) for message in row["messages"])
    assert len(loaded) == examples and len(set(loaded["group"])) == read
    training, validation = split(loaded, 0.15, 42)
    assert 0.10 <= len(validation) / examples <= 0.20
    said = [{example["prompt"][-1]["content"] for example in part} for part in (training, validation)]
    assert not said[0] & said[1]


def run(code: str) -> int:
    try:
        return subprocess.run([sys.executable, "-I", "-c", code], timeout=SECONDS, capture_output=True).returncode
    except subprocess.TimeoutExpired:
        return -1


@pytest.mark.slow
def test_every_function_passes_its_assertions_and_an_empty_one_does_not(root, say):
    pairs = rows(root, "python_functions.jsonl")
    assert all(row["test"].count("assert") >= 3 for row in pairs)
    names = [re.findall(r"^def (\w+)", row["output"], re.MULTILINE) for row in pairs]
    empty = ["\n".join(f"def {name}(*a, **k): return None" for name in defined) for defined in names]
    with ThreadPoolExecutor(2) as pool:
        passed = list(pool.map(run, [f"{row['output']}\n{row['test']}" for row in pairs]))
        fooled = list(pool.map(run, [f"{code}\n{row['test']}" for code, row in zip(empty, pairs)]))
    assert [row["instruction"] for row, code in zip(pairs, passed) if code] == []
    assert [row["instruction"] for row, code in zip(pairs, fooled) if code == 0] == []
    say(f"{len(pairs)} functions: all pass their assertions, and none passes without its body")


def test_the_summaries_have_three_sentences_and_csv_keeps_them_exactly(root):
    file = root / "data_samples" / "clinical_summaries.csv"
    with file.open(encoding="utf-8", newline="") as stream:
        by_csv = list(csv.DictReader(stream))
    assert by_csv == pd.read_csv(file, keep_default_na=False).to_dict("records")
    assert sum("\n" in row["input"] for row in by_csv) >= 5 and sum('"' in row["input"] for row in by_csv) >= 10
    for row in by_csv:
        assert len(re.findall(r"[.!?](?=\s|$)", re.sub(r"\b(vs|Dr|approx)\.", r"\1", row["output"]))) == 3, row[
            "output"
        ]
        assert "Caution: " in row["output"] and 60 <= len(row["input"].split()) <= 170
    assert len({row["instruction"] for row in by_csv}) > 40
    loaded = load_examples(file)
    assert [example["completion"][0]["content"] for example in loaded] == [row["output"].strip() for row in by_csv]


def test_the_tutor_asks_one_question_and_ends_with_a_recap(root):
    for row in rows(root, "chat_tutor.jsonl"):
        roles = [message["role"] for message in row["messages"]]
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns == ["user", "assistant"] * (len(turns) // 2) and 4 <= len(turns) <= 8
        replies = [message["content"] for message in row["messages"] if message["role"] == "assistant"]
        assert all(reply.count("?") == 1 for reply in replies[:-1]), replies
        assert re.search(r"^Recap: ", replies[-1], re.MULTILINE)


def test_the_rows_were_composed_one_by_one(root, say):
    """Over all pairs, the largest share of common word triples (Jaccard) in what is asked and in what is answered."""
    for name in ("python_functions.jsonl", "chat_tutor.jsonl"):
        for side in ("user", "assistant"):
            texts = [
                " ".join(message["content"] for message in row["messages"] if message["role"] == side)
                if "messages" in row
                else row["instruction" if side == "user" else "output"]
                for row in rows(root, name)
            ]
            words = [re.findall(r"\w+", text.lower()) for text in texts]
            triples = [set(zip(said, said[1:], said[2:])) for said in words]
            worst = max(len(a & b) / len(a | b) for a, b in combinations(triples, 2))
            say(f"{name}, {side}: at most {worst:.0%} of the word triples in common")
            assert worst <= 0.45


def test_the_card_counts_right(root):
    card = (root / "data_samples/README.md").read_text(encoding="utf-8")
    for name, count in re.findall(r"^\| `([\w.]+)` \| (\d+) \|", card, re.MULTILINE):
        found = (
            len(pd.read_csv(root / "data_samples" / name))
            if name.endswith(".csv")
            else len((root / "data_samples" / name).read_bytes().splitlines())
        )
        assert found == int(count), name

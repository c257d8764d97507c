"""Whatever the rows and files are: the loader raises nothing but its own error, and loses no record."""

import contextlib
import gzip
import io
import json
import random

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers.data import split
from helpers.data.check import check_examples
from helpers.data.convert import ANSWER, QUESTION, SYSTEM, TURNS, texts_of
from helpers.data.issues import DataError
from helpers.data.tokens import load_tokenizer

CHARACTERS = st.characters(exclude_categories=())  # half characters too
ODD = "| |\x00|Ã©|a@b.co|[|[{|[[]]|nan|\ufeff|1e999|test|train"
TEXTS = st.text(CHARACTERS, max_size=30) | st.sampled_from([*ODD.split("|"), "a<|im_end|>b", "long " * 50])
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | TEXTS | st.binary(max_size=8)
KNOWN = [*QUESTION, *ANSWER, *TURNS, *SYSTEM, "text", "history", "role", "content", "from", "value", "weight", "split"]
NAMES = st.sampled_from(KNOWN) | TEXTS
TURN = st.fixed_dictionaries(
    {},
    optional={"role": st.sampled_from(["system", "user", "assistant", "gpt", "x", None]) | LEAVES}
    | dict.fromkeys(("content", "from", "value", "weight"), LEAVES),
)
VALUES = st.recursive(
    LEAVES | st.lists(TURN, max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=4),
)
RECORDS = st.dictionaries(NAMES, VALUES, max_size=5) | VALUES
CAREFUL = settings(deadline=None, suppress_health_check=list(HealthCheck), max_examples=60)


@pytest.fixture(autouse=True)
def rows_are_soon_too_large(monkeypatch):
    for module in ("parse", "convert"):
        monkeypatch.setattr(f"helpers.data.{module}.LONGEST_ROW", 200)


def judge(source, records=None, tokenizer=None):
    """Check a source; the report, or None where it was refused in one sentence."""
    try:
        report = check_examples(source, tokenizer)
    except DataError as error:
        assert str(error).strip() and "\n" not in str(error).strip()
        return None
    counts = report.counts
    assert counts["kept"] + counts["rejected"] == counts["input"] and counts["rejected"] == len(report.rejected)
    assert counts["examples"] == len(report.examples) >= counts["kept"]
    assert records is None or counts["input"] == records
    assert str(report) and all(row["reason"] and row["fix"] for row in report.rejected)
    return report


@CAREFUL
@given(st.lists(RECORDS, max_size=12))
def test_arbitrary_rows_in_memory(tiny_model, rows):
    judge(rows, records=len(rows))
    report = judge(rows, len(rows), load_tokenizer(str(tiny_model)))
    with contextlib.suppress(DataError):
        training, _ = split(report.examples, 0.5, seed=0)
        assert not [text for x in training for text in texts_of(x) if "prompt" in x and "<|im_end|>" in text]


@CAREFUL
@given(rows=st.lists(RECORDS, min_size=1, max_size=8), ascii_only=st.booleans())
def test_arbitrary_rows_as_json_lines(tmp_path_factory, rows, ascii_only):
    lines = [json.dumps(row, default=str, ensure_ascii=ascii_only) for row in rows]
    path = tmp_path_factory.getbasetemp() / "fuzz.jsonl"
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    report = judge(path)
    if report and not lines[0].startswith("["):
        assert report.counts["input"] == len(rows)
    if report:
        saved = report.save_rejected(path.with_name("rejected.jsonl")).read_text(encoding="utf-8").split("\n")
        assert [json.loads(line)["line"] for line in saved[:-1]] == [row["line"] for row in report.rejected]


@CAREFUL
@given(
    content=st.binary(max_size=400) | TEXTS.map(lambda text: text.encode("utf-16", "surrogatepass")),
    name=st.sampled_from(["a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet", "a.txt", "a.jsonl.gz", "a"]),
)
def test_arbitrary_bytes_as_a_file(tmp_path_factory, content, name):
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(content)
    judge(path)
    judge({name: content})


@CAREFUL
@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=8))
def test_arbitrary_fields_in_a_csv(tmp_path_factory, rows):
    rows = [tuple(field.encode("utf-8", "ignore").decode().replace("\x00", "") for field in row) for row in rows]
    path = tmp_path_factory.getbasetemp() / "fuzz.csv"
    import csv

    with path.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([("question", "answer"), *rows])
    report = judge(path)
    if report:
        assert report.counts["input"] == len(rows)
        given_rows = {(question.strip(), answer.strip()) for question, answer in rows}
        assert all((x["prompt"][0]["content"], x["completion"][0]["content"]) in given_rows for x in report.examples)


# ------------------------------------------------------------------------------------------------ mutated files

ROWS = [
    {"instruction": f'Ask "{n}", please\nnow é{n}', "input": "", "output": f"Answer, number {n}."} for n in range(12)
]
CHATS = [
    {"messages": [{"role": "user", "content": f"Hi {n}"}, {"role": "assistant", "content": f"Hello {n}!"}]}
    for n in range(8)
]


def originals():
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
    packed = io.BytesIO()
    pd.DataFrame(ROWS).to_parquet(packed)
    return {
        "a.jsonl": lines,
        "chat.jsonl": "".join(json.dumps(row) + "\n" for row in CHATS).encode(),
        "b.json": json.dumps(ROWS, indent=1).encode(),
        "c.csv": pd.DataFrame(ROWS).to_csv(index=False).encode(),
        "d.tsv": pd.DataFrame(ROWS).to_csv(index=False, sep="\t").encode("utf-16"),
        "e.parquet": packed.getvalue(),
        "f.jsonl.gz": gzip.compress(lines, mtime=0),
    }


ACCIDENTS = [bytes([byte]) for byte in b'"\n{}[,\x00\xff\\\r'] + [b"null", b"\xef\xbb\xbf", b"\xed\xa0\x80"]


def mutate(content, chosen):
    """One to four small accidents: bytes changed, cut out, put in, doubled, swapped, or the end lost."""
    data = bytearray(content)
    for _ in range(chosen.randint(1, 4)):
        at, length = chosen.randrange(len(data) + 1), chosen.choice([1, 1, 2, 5, 40])
        kind = chosen.randrange(7)
        if kind == 0:
            data[at : at + length] = chosen.randbytes(length)
        elif kind == 1:
            del data[at : at + length]
        elif kind == 2:
            data[at:at] = chosen.choice(ACCIDENTS)
        elif kind == 3:
            data[at:at] = data[at : at + length]
        elif kind == 4:
            data = data[:at] if chosen.random() < 0.3 else data
        elif kind == 5 and at < len(data):
            data[at] ^= 1 << chosen.randrange(8)
        else:
            other = chosen.randrange(len(data) + 1)
            data[at : at + length], data[other : other + length] = data[other : other + length], data[at : at + length]
    return bytes(data)


def fuzz(tmp_path, count, say):
    chosen, kept, refused = random.Random(2026), 0, 0
    sources = originals()
    for number in range(count):
        name = list(sources)[number % len(sources)]
        path = tmp_path / name
        path.write_bytes(mutate(sources[name], chosen))
        report = judge(path)
        refused += report is None
        kept += report.counts["kept"] if report else 0
        if report and name.endswith(".jsonl") and not path.read_bytes().lstrip().startswith(b"["):
            assert report.counts["input"] == sum(bool(line.strip()) for line in path.open(encoding="latin-1"))
        if report and report.ready and number % 10 == 0:
            try:
                split(report.examples, 0.15, seed=0)
            except DataError:
                assert len(report.examples) < 20
    say(f"{count:,} mutated files: {count - refused:,} read, {refused:,} refused in one sentence, {kept:,} rows kept")


def test_a_hundred_mutated_files(tmp_path, say):
    fuzz(tmp_path, 100, say)


@pytest.mark.slow
def test_two_thousand_mutated_files(tmp_path, say):
    fuzz(tmp_path, 2000, say)

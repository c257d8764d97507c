"""Any source in, records out: every format, encoding and dress, and a refusal in one sentence for what is no data."""

import gzip
import io
import json
import os
import subprocess
import sys
from functools import partial

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from datasets import Dataset, DatasetDict

import helpers.data.parse
import helpers.data.read
from helpers.data.check import check_examples
from helpers.data.issues import DataError
from helpers.data.read import choose_hub_files, part_of, read
from tests.fake_hub import FakeHub

ROWS = [
    {"instruction": 'Say "hi", twice', "output": "hi,\nhi"},
    {"instruction": "Größe in €?", "output": "  5 €; or | so\t"},
    {"instruction": "日本語", "output": "emoji 🌿"},
]
LATIN = ROWS[:2]


def values(source):
    return [record.value for record in read(source)]


def as_jsonl(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def as_csv(rows, **how):
    return pd.DataFrame(rows).to_csv(index=False, lineterminator="\n", **how)


WRITTEN = {
    "a.jsonl": as_jsonl,
    "b.json": partial(json.dumps, ensure_ascii=False),
    "c.json": as_jsonl,
    "d.ndjson": as_jsonl,
    "e.json": lambda rows: json.dumps({"version": 1, "data": rows}, indent=1),
    "f.json": lambda rows: pd.DataFrame(rows).to_json(),
    "g.json": lambda rows: json.dumps({name: [row[name] for row in rows] for name in rows[0]}),
    "h.json": lambda rows: "\n".join(json.dumps(row, indent=2) for row in rows),
    "i.jsonl": partial(json.dumps, indent=1),
    "j.csv": as_csv,
    "k.csv": partial(as_csv, sep=";"),
    "l.tsv": partial(as_csv, sep="\t"),
    "m.csv": partial(as_csv, quoting=1),
    "n.txt": as_jsonl,
    "o.csv": as_jsonl,
    "p.txt": as_csv,
}


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "cp1252"])
@pytest.mark.parametrize("packed", [False, True])
def test_every_format_in_every_encoding(tmp_path, name, encoding, packed):
    rows = LATIN if encoding == "cp1252" else ROWS
    content = WRITTEN[name](rows).encode(encoding)
    file = tmp_path / (name + ".gz" * packed)
    file.write_bytes(gzip.compress(content) if packed else content)
    assert values(file) == rows


def test_latin_1_without_a_windows_character(tmp_path):
    (tmp_path / "a.jsonl").write_bytes('{"text": "caf\u00e9 \u0081"}\n'.encode("latin-1"))
    assert values(tmp_path / "a.jsonl") == [{"text": "caf\u00e9 \u0081"}]


def test_one_wrong_byte_does_not_garble_the_file(tmp_path):
    (tmp_path / "a.jsonl").write_bytes('{"text": "größer, schöner"}\n'.encode() + b'{"text": "caf\xe9"}\n')
    assert values(tmp_path / "a.jsonl") == [{"text": "größer, schöner"}, {"text": "caf\udce9"}]


def test_parquet_folder_and_tables_in_memory(tmp_path):
    table = pa.Table.from_pylist(ROWS)
    parquet.write_table(table, tmp_path / "train.parquet")
    folder = tmp_path / "a folder, ünïcode"
    (folder / "deep").mkdir(parents=True)
    (folder / "1.jsonl").write_text(as_jsonl(ROWS), encoding="utf-8")
    (folder / "deep" / "2.csv").write_text(as_csv(ROWS), encoding="utf-8")
    (folder / "README.md").write_text("not data")
    (folder / ".hidden.jsonl").write_text("not data")
    assert values(tmp_path / "train.parquet") == ROWS
    assert values(str(folder)) == ROWS + ROWS
    assert values(pd.DataFrame(ROWS)) == values(Dataset.from_list(ROWS)) == values(ROWS) == ROWS
    assert values(DatasetDict(train=Dataset.from_list(ROWS))) == ROWS
    assert values({"up.jsonl": as_jsonl(ROWS).encode(), "b.csv": as_csv(ROWS).encode()}) == ROWS + ROWS


def test_missing_values_of_a_dataframe_are_null():
    table = pd.DataFrame({"question": ["a", float("nan"), None, pd.NA, pd.NaT]})
    assert [row["question"] for row in values(table)] == ["a", None, None, None, None]
    chats = pd.read_parquet(io.BytesIO(pd.DataFrame({"messages": [[{"role": "user", "content": "x"}]]}).to_parquet()))
    assert list(values(chats)[0]["messages"]) == [{"role": "user", "content": "x"}]


def test_lines_are_counted_as_an_editor_does(tmp_path):
    (tmp_path / "a.jsonl").write_text('\n{"text": "a"}\n\n  \n{"text": "b"}\nbroken\n{"text": "c"}')
    found = [(record.line, record.issue is None) for record in read(tmp_path / "a.jsonl")]
    assert found == [(2, True), (5, True), (6, False), (7, True)]
    (tmp_path / "a.json").write_text('[\n {"text": "a"},\n\n {"text":\n "b"},\n {"text": "c"}]')
    assert [record.line for record in read(tmp_path / "a.json")] == [2, 4, 6]
    (tmp_path / "a.csv").write_text('text,id\n"one\ntwo",1\n\nthree,2\n')
    assert [record.line for record in read(tmp_path / "a.csv")] == [2, 5]


def test_what_follows_a_broken_row_is_still_read(tmp_path):
    cases = {
        "a.jsonl": ('{"text": "a"}\n{"text": \n{"text": "c"}\n', [True, False, True]),
        "b.jsonl": (
            f'{{"text": "a"}}\n{{"text": {"9" * 5000}}}\n{"[" * 100_000}\n{{"text": 1}}',
            [True, False, False, True],
        ),
        "c.json": ('[{"text": "a"}, {"text": "b"}, {"text" "c"}, {"text": "d"}]', [True, True, False]),
        "d.json": ('[{"text": "a"},\n{"text": "b"}', [True, True, False]),
        "e.json": ('[{"text": "a"}] and more', [True, False]),
        "f.csv": ('a,b\n1,2\n"x"y,2\n3,4\n5\n6,7,8\n9,0\n', [True, False, True, False, False, True]),
        "g.csv": ('a,b\n1,2\n"never closed,2\n3,4\n', [True, False]),
    }
    for name, (content, expected) in cases.items():
        (tmp_path / name).write_text(content)
        assert [record.issue is None for record in read(tmp_path / name)] == expected, name
    reasons = [record.issue.reason for name in cases for record in read(tmp_path / name) if record.issue]
    assert any("a quote opened in line 3 is never closed" in reason for reason in reasons)
    assert any("(line 2, column 9)" in reason for reason in reasons)
    assert any("3 fields, but the header has 2" in reason for reason in reasons)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "is empty"),
        ("a.csv", b"\xef\xbb\xbf \n\n", "is empty"),
        ("a.jsonl", os.urandom(5000), "binary|PDF|picture"),
        ("a.csv", b"PK\x03\x04" + b"x" * 50, "Excel"),
        ("a.json", b"%PDF-1.7 \n", "PDF"),
        ("a.parquet", b"PAR1 and then nothing", "not readable as Parquet"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 999, mtime=0)[:-20], "cannot be read"),
        ("a.txt", b"just some words\n", "neither JSON"),
        ("a.csv", b"question,answer,question\n1,2,3\n", "line 1: two columns are named 'question'"),
    ],
)
def test_what_is_no_data_is_refused_in_one_sentence(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        values(tmp_path / name)
    assert "\n" not in str(error.value) and name in str(error.value)


def test_large_files_are_refused_before_they_are_read(tmp_path, monkeypatch):
    with (tmp_path / "big.jsonl").open("wb") as stream:
        stream.truncate(2 * 2**30 + 1)  # sparse: takes no room on the disk
    monkeypatch.setattr(helpers.data.read.DataFile, "stream", lambda self: pytest.fail("it was opened"))
    with pytest.raises(DataError, match=r"big.jsonl has more than the 2.0 GiB"):
        values(tmp_path / "big.jsonl")


def test_a_small_archive_that_unpacks_to_too_much_is_stopped(tmp_path, monkeypatch):
    (tmp_path / "bomb.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 100_000))
    monkeypatch.setattr(helpers.data.parse, "LARGEST", 1_000_000)
    with pytest.raises(DataError, match=r"bomb.jsonl.gz has more than"):
        values(tmp_path / "bomb.jsonl.gz")


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.csv.gz", "a.json"])
def test_a_row_too_large_for_any_model_costs_only_itself(tmp_path, name):
    rows = [{"question": "a", "answer": "b" * (2**24 + 1)}, {"question": "c", "answer": "d"}]
    content = (as_csv(rows) if "csv" in name else json.dumps(rows) if name == "a.json" else as_jsonl(rows)).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    report = check_examples(tmp_path / name)
    assert (report.counts["kept"], report.findings["too large"].count) == (1, 1)
    assert len(report.save_rejected(tmp_path / "rejected.jsonl").read_text()) < 2000


def test_what_free_memory_cannot_hold_or_has_too_many_rows_is_refused(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text(as_jsonl(ROWS) * 9)
    parquet.write_table(pa.Table.from_pylist(ROWS * 9), tmp_path / "b.parquet")
    monkeypatch.setattr("helpers.data.parse.MOST_ROWS", 20)
    monkeypatch.setattr("helpers.data.read.MOST_ROWS", 20)
    for source in (tmp_path / "a.jsonl", tmp_path / "b.parquet", ROWS * 9):
        with pytest.raises(DataError, match="has more than 20 rows"):
            values(source)
    assert len(values(ROWS * 2)) == 6
    (tmp_path / "c.json").write_text(json.dumps(ROWS * 6))
    memory = type("Memory", (), {"available": 6 * (tmp_path / "c.json").stat().st_size})
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)
    with pytest.raises(DataError, match=r"c.json has more than the 0.0 GiB.*as JSON lines"):
        values(tmp_path / "c.json")


def test_names_that_stand_twice_and_broken_headers_are_said(tmp_path):
    twice = '{"question": "a", "answer": "b", "answer": "c"}'
    for name, layout in (("a.jsonl", "{}\n{}"), ("a.json", "[{},\n{}]")):
        (tmp_path / name).write_text(layout.format(twice, json.dumps(ROWS[0])))
        first, second = read(tmp_path / name)
        assert "'answer' occurs twice" in first.issue.reason and second.value == ROWS[0]
    (tmp_path / "a.csv").write_text('"quest"ion,answer\na,b\n')
    with pytest.raises(DataError, match="no header that can be read"):
        values(tmp_path / "a.csv")


def test_sources_that_are_none(tmp_path):
    (tmp_path / "empty").mkdir()
    two = pd.DataFrame([[1, 2]], columns=["a", "a"])
    for source, message in [
        (tmp_path / "no.jsonl", "No data file at"),
        (tmp_path / "empty", "No data file in the folder"),
        (3, "int is no source"),
        ("a\0b.csv", "cannot be opened|No data file"),
        ("x" * 5000, "cannot be opened"),
        (two, "two columns"),
    ]:
        with pytest.raises(DataError, match=message):
            values(source)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="permissions do not bind this user")
def test_a_file_without_permission(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}")
    (tmp_path / "a.jsonl").chmod(0)
    with pytest.raises(DataError, match="permissions"):
        values(tmp_path / "a.jsonl")


def test_names_that_mark_held_out_parts():
    assert {*map(part_of, ("data/validation-00000-of-00001.parquet", "my_val.jsonl", "dev"))} == {"validation"}
    assert {*map(part_of, ("test", "a/eval.csv", "train/test.csv", "test/0000.parquet"))} == {"test"}
    assert {*map(part_of, ("contest.jsonl", "testing/rows.jsonl", "latest.csv"))} == {""}
    assert part_of("validation_folder/train.jsonl") == "train"
    train = ["data/train-0.parquet", "data/train-1.parquet"]
    assert choose_hub_files("a/b", [*train, "data/test-0.parquet"]) == train
    with pytest.raises(DataError, match="several parts: main, socratic"):
        choose_hub_files("a/b", ["main/train.jsonl", "socratic/train.jsonl"])
    with pytest.raises(DataError, match="no JSON"):
        choose_hub_files("a/b", [])


def test_a_data_set_on_the_hub(tmp_path, root):
    files = {"train.jsonl": as_jsonl(ROWS).encode(), "test.jsonl": b'{"text": "held out"}\n'}
    code = (
        "from helpers.data.read import read\nfrom helpers.data.issues import DataError\n"
        "print(ascii([(r.value, r.file) for r in read('owner/letters')]))\n"
        "try: list(read('owner/nothing'))\nexcept DataError as error: print(error)"
    )
    with FakeHub() as hub:
        hub.add("owner/letters", files | {"script.py": b"raise SystemExit('never run')"})
        environment = os.environ | hub.environment(tmp_path) | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=120)
        assert hub.downloaded() == ["train.jsonl"]
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.strip().splitlines()
    assert eval(first) == [(row, "owner/letters/train.jsonl") for row in ROWS]
    assert "no data set 'owner/nothing' on the Hub" in second


def test_the_lines_of_a_row_that_is_too_long_are_no_rows(tmp_path, monkeypatch):
    for module in ("issues", "parse"):
        monkeypatch.setattr(f"helpers.data.{module}.LONGEST_ROW", 200)
    long = "w " * 150
    text = f'question,answer\nA?,one\n"{long}","first\nnot,mine\nlast"\n"{long}",two\nB?,three\n'
    (tmp_path / "long.csv").write_text(text, encoding="utf-8")
    report = check_examples(tmp_path / "long.csv")
    assert report.counts["input"] == 4 and report.counts["kept"] == 2
    assert [row["completion"][0]["content"] for row in report.examples] == ["one", "three"]

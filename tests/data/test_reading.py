"""Files of a user: what is read, and the one line that refuses what is not."""

import gzip
import json
import os
import random
from pathlib import Path

import pytest
from datasets import Dataset

from hf_dynsparse.data.files import DataError, check_file, read_file


NOISE = "".join(random.Random(0).choices("abcdefghij ", k=3000))
GZIP = gzip.compress(f"{NOISE}\n".encode())
BIG = b"x" * (1 << 17) + b"\n"  # what follows is beyond the first block

# Name, content, and words of the error.
DAMAGED = {
    "invalid UTF-8": ("a.txt", b"fine\nline \xff bad\n", ("0xff in line 2", "UTF-8")),
    "invalid UTF-8 at the end": ("a.txt", b"caf\xc3", ("0xc3 in line 1",)),
    "late invalid UTF-8": ("a.txt", BIG + b"\xff\n", ("0xff in line 2",)),
    "late invalid UTF-8 in CSV": ("a.csv", b"text\n" + BIG + b"\xff\n", ("0xff in line 3",)),
    "late invalid UTF-8 in JSON": ("a.jsonl", b'{"text": "' + BIG[:-1] + b'"}\n{"text": "\xff"}\n', ("line 2",)),
    "UTF-16": ("a.txt", "hello there\n".encode("utf-16"), ("UTF-16", "Save it as UTF-8")),
    "UTF-16 without a mark": ("a.csv", "text\nhello there\n".encode("utf-16-le"), ("UTF-16",)),
    "UTF-16 of JSON": ("a.jsonl", '{"text": "a"}\n'.encode("utf-16"), ("UTF-16",)),
    "cut gzip": ("a.txt.gz", GZIP[:-400], ("gzip", "cut")),
    "cut gzip of JSON": ("a.json.gz", gzip.compress(json.dumps([{"text": NOISE}]).encode())[:-400], ("gzip",)),
    "damaged gzip": ("a.txt.gz", GZIP[:40] + b"\0" * 40 + GZIP[80:], ("gzip", "damaged")),
    "no gzip": ("a.txt.gz", b"plain text\n", ("gzip", "or none")),
    "cut lines of JSON": ("a.jsonl", b'{"text": "a"}\n{"text": "b', ("JSON", "Unterminated string", "line 2")),
    "cut document": ("a.json", b'[\n{"text": "a"},\n{"te', ("JSON", "line 3")),
    "lines that are no objects": ("a.jsonl", b'"a"\n"b"\n', ("str instead of an object in line 1",)),
    "more fields": ("a.csv", b"text,label\na,b\nc,d,e\n", ("2 fields", "Got 3 in line 3")),
    "more fields throughout": ("a.csv", b"text,label\na,b,c\nd,e,f\n", ("2 fields", "Got 3 in line 2")),
    "fewer fields": ("a.csv", b"text,label\na,b\nc\n", ("2 fields", "Got 1 in line 3")),
    "fewer fields of a TSV": ("a.tsv", b"text\tlabel\na\n", ("2 fields", "Got 1 in line 2")),
    "an open quote": ("a.csv", b'text,label\n"a,b\nc,d\n', ("a.csv", "unexpected end")),
    "a column twice": ("a.csv", b"text,text\na,b\n", ("header", "['text', 'text']")),
    "a header alone": ("a.csv", b"text,label\n", ("at least one row", "holds none")),
    "an empty list": ("a.json", b"[]", ("at least one row", "holds none")),
    "no Parquet": ("a.parquet", b"PAR1 and so on", ("Parquet", "cut")),
    "empty": ("a.txt", b"", ("must hold something", "empty")),
    "blank": ("a.txt.gz", gzip.compress(b" \n\n\t"), ("must hold something", "empty")),
}


def rows_of(path: Path, tmp_path: Path, *, streaming: bool = False) -> list[dict[str, object]]:
    check_file(str(path), "--train_file")
    return list(read_file(str(path), cache_dir=str(tmp_path / "cache"), streaming=streaming))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("case", DAMAGED)
def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path, case: str, streaming: bool) -> None:
    name, content, words = DAMAGED[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        rows_of(tmp_path / name, tmp_path, streaming=streaming)
    message = str(error.value)
    assert "\n" not in message
    for word in (*words, str(tmp_path / name)):
        assert word in message


READ = {
    "lines": ("a.txt", "one\r\n\ntwo", [{"text": "one"}, {"text": ""}, {"text": "two"}]),
    "a table": (
        "a.csv",
        '\ufefftext, label\nnull,NA\n"a, b",""\n\n"two\nlines",x',
        [{"text": "null", "label": "NA"}, {"text": "a, b", "label": ""}, {"text": "two\nlines", "label": "x"}],
    ),
    "a table with tabs": ("a.tsv", 'text\tlabel\n"a\tb\n', [{"text": '"a', "label": "b"}]),
    "lines of JSON": ("a.jsonl", '{"text": "a"}\n{"text": "b"}\n', [{"text": "a"}, {"text": "b"}]),
    "a list of strings": ("a.json", '["a", "b"]', [{"text": "a"}, {"text": "b"}]),
}


@pytest.mark.parametrize(("streaming", "compressed"), [(False, True), (True, False)])
@pytest.mark.parametrize("case", READ)
def test_what_is_read(tmp_path: Path, case: str, streaming: bool, compressed: bool) -> None:
    name, content, rows = READ[case]
    path = tmp_path / (name + ".gz" * compressed)
    path.write_bytes(gzip.compress(content.encode()) if compressed else content.encode())
    assert rows_of(path, tmp_path, streaming=streaming) == rows


def test_columns_of_numbers_are_numbers(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id,score,gap,mixed\n1,0.5,1,1\n-2,3,,one\n")
    rows = read_file(str(tmp_path / "a.csv"), "validation", str(tmp_path / "cache"))
    assert list(rows) == [
        {"id": 1, "score": 0.5, "gap": "1", "mixed": "1"},
        {"id": -2, "score": 3.0, "gap": "", "mixed": "one"},
    ]
    assert str(rows.split) == "validation"


def test_long_cells_and_parquet(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\n" + "x" * 200_000 + "\n")
    assert len(rows_of(tmp_path / "a.csv", tmp_path)[0]["text"]) == 200_000  # type: ignore[arg-type]
    Dataset.from_dict({"text": ["a", None]}).to_parquet(tmp_path / "a.parquet")
    assert rows_of(tmp_path / "a.parquet", tmp_path) == [{"text": "a"}, {"text": None}]


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text\na\n")
    assert rows_of(path, tmp_path) == [{"text": "a"}]
    path.write_text("text\nb\n")
    os.utime(path, ns=(1, 1))  # whatever the clock's resolution
    assert rows_of(path, tmp_path) == [{"text": "b"}]


def test_names(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`--test_file` must end in \.csv, \.json, plain or \.gz\. Got a\.txt"):
        check_file("a.txt", "--test_file", ("csv", "json"))
    for path in (tmp_path / "none.txt", tmp_path):
        with pytest.raises((ValueError, OSError), match=r"`--test_file` must .* Got .*"):
            check_file(str(path), "--test_file")


def test_errors_of_the_system_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hf_dynsparse.data.files.load_dataset", full)
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(OSError, match="No space left"):
        rows_of(tmp_path / "a.txt", tmp_path)

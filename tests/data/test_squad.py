"""Files of SQuAD in all their forms, and scores worked out by hand and by `evaluate`."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from hf_dynsparse.data.files import DataError
from hf_dynsparse.data.squad import (
    check_squad_rows,
    exact_match,
    normalize_answer,
    read_squad,
    read_squad_file,
    squad_metrics,
    squad_v2_metrics,
    token_f1,
)


OFFICIAL = {
    "version": "v2.0",
    "data": [
        {
            "title": "Birds",
            "paragraphs": [
                {
                    "context": "The robin\u2028sang at dawn.",
                    "qas": [
                        {"id": "1", "question": "Who?", "answers": [{"text": "robin", "answer_start": 4}]},
                        {"id": "2", "question": "Why?", "answers": [], "is_impossible": True},
                    ],
                },
                {"context": "An owl.", "qas": [{"id": 3, "question": "What?"}]},
            ],
        }
    ],
}
ROWS = [
    {
        "id": "1",
        "title": "Birds",
        "context": "The robin\u2028sang at dawn.",
        "question": "Who?",
        "answers": {"text": ["robin"], "answer_start": [4]},
    },
    {
        "id": "2",
        "title": "Birds",
        "context": "The robin\u2028sang at dawn.",
        "question": "Why?",
        "answers": {"text": [], "answer_start": []},
    },
    {
        "id": "3",
        "title": "Birds",
        "context": "An owl.",
        "question": "What?",
        "answers": {"text": [], "answer_start": []},
    },
]


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(OFFICIAL),
        json.dumps(ROWS, ensure_ascii=False),
        json.dumps({"data": ROWS}),
        "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n\n",
    ],
    ids=["official", "list", "under data", "lines"],
)
def test_read(tmp_path: Path, text: str) -> None:
    (tmp_path / "squad.json").write_bytes(text.encode())
    assert list(read_squad(tmp_path / "squad.json")) == ROWS
    (tmp_path / "squad.json.gz").write_bytes(gzip.compress(text.encode()))
    assert list(read_squad(tmp_path / "squad.json.gz")) == ROWS


def test_read_a_single_row(tmp_path: Path) -> None:
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps(ROWS[0]))
    assert list(read_squad(str(path))) == ROWS[:1]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "must hold JSON. Got .*file.json"),
        ("no json", "must hold JSON"),
        ('{"id": "1"}\n{"id": ', "must hold JSON"),
        ('[{"id": "1", "question": "?"}]', "entry 0 without .*context"),
        ('{"data": [{"paragraphs": [{"context": "c", "qas": [{"question": "?"}]}]}]}', "entry 0 without .*id"),
        ('{"data": [{"paragraphs": [{"context": "c"}]}]}', "qas"),
        ("[1, 2]", "entry 0"),
        ("7", "must hold JSON.*list of entries"),
        ('[{"id": "1", "question": "?", "context": null}]', "entry 0 .*context must be a string, not None"),
        ('[{"id": "1", "question": 7, "context": "c"}]', "entry 0 .*question must be a string, not int 7"),
        ('{"data": []}', "at least one. Got .*file.json"),
        ('{"data": [{"title": "x", "paragraphs": []}]}', "at least one"),
    ],
)
def test_read_refuses(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "file.json").write_text(text)
    with pytest.raises(ValueError, match=problem):
        list(read_squad(tmp_path / "file.json"))


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.json.gz", gzip.compress(b"{}" * 99, mtime=0)[:-12], "gzip that is cut"),
        ("a.json", b'{"id": "\xff"}', "0xff in line 1, which is not UTF-8"),
        ("a.json", json.dumps(OFFICIAL).encode("utf-16"), "UTF-16"),
        ("a.json", b"[" * 100_000, "must hold JSON.*recursion"),
        ("a.jsonl", json.dumps(ROWS[0] | {"answers": {"text": [["x"]], "answer_start": ["y"]}}).encode(), "a.jsonl"),
    ],
)
def test_damaged_files(tmp_path: Path, name: str, content: bytes, problem: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=problem) as error:
        read_squad_file(str(tmp_path / name), str(tmp_path / "cache"))
    assert "\n" not in str(error.value)


def row(text: str = "owl", start: int = 3, **changes: Any) -> dict[str, Any]:
    answers = {"text": [text], "answer_start": [start]}
    return {"id": "7", "context": "An owl.", "question": "What?", "answers": answers} | changes


def test_good_rows_pass() -> None:
    check_squad_rows([row(), row(id="8", title="Birds")], "train")
    check_squad_rows(ROWS, "train", may_lack_answers=True)
    check_squad_rows([row(answers=None), row(id="8", answers={})], "test", needs_answers=False)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], ("train", "Got none")),
        ([row(context=None)], ("without context", "question")),
        ([{"id": "7", "question": "What?", "context": "An owl."}], ("without answers",)),
        ([row(), row()], ("'7' twice",)),
        ([row(answers={"text": [], "answer_start": []})], ("'7'", "--version_2_with_negative")),
        ([row(start=2)], ("'owl'", "'7'", "' ow'")),
        ([row(start=-4)], ("'owl'", "'7'")),
        ([row(text="", start=0)], ("''", "'7'")),
        ([row(context="  ")], ("context", "'  '", "'7'")),
        ([row(context=["An owl."])], ("context", "list", "'7'")),
        ([row(question=3)], ("question", "int 3", "'7'")),
        ([row(answers="owl")], ("two lists", "Got 'owl'", "'7'")),
        ([row(answers=[{"text": "owl", "answer_start": 3}])], ("two lists", "'7'")),
        ([row(answers={"text": ["owl"], "answer_start": []})], ("one length", "'7'")),
        ([row(answers={"text": [None], "answer_start": [3]})], ("strings", "'7'")),
        ([row(answers={"text": ["owl"], "answer_start": [None]})], ("whole numbers", "'7'")),
    ],
)
def test_bad_rows(rows: list[dict[str, Any]], words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="train rows") as error:
        check_squad_rows(rows, "train")
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Cat, a dog\tand AN owl!", "cat dog and owl"),
        ("theatre banana anthem", "theatre banana anthem"),
        ("U.S.A.", "usa"),
        ("1,345,596", "1345596"),
        ("the-end", "theend"),  # punctuation goes first, and takes the article along
        ("École “A”", "école “ ”"),  # quotes beyond ASCII stay
        ("The", ""),
        ("", ""),
    ],
)
def test_normalize(text: str, normal: str) -> None:
    assert normalize_answer(text) == normal


@pytest.mark.parametrize(
    ("prediction", "answer", "exact", "f1"),
    [
        ("the Cat.", "cat", 1, 1),
        ("a black cat", "cat", 0, 2 / 3),
        ("black cat sat", "cat sat down", 0, 2 / 3),
        ("cat cat", "cat", 0, 2 / 3),  # a word counts as often as it occurs in both
        ("dog", "cat", 0, 0),
        ("", "cat", 0, 0),
        ("", "the", 1, 0),  # the official script has it so
    ],
)
def test_scores_of_one_answer(prediction: str, answer: str, exact: float, f1: float) -> None:
    assert exact_match(prediction, answer) == exact
    assert token_f1(prediction, answer) == pytest.approx(f1)


PREDICTIONS = [
    {"id": "x", "prediction_text": "black cat"},
    {"id": "y", "prediction_text": ""},
    {"id": "z", "prediction_text": "The owl"},
]
REFERENCES = [
    {"id": "z", "answers": {"text": ["an owl!"], "answer_start": [0]}},
    {"id": "x", "answers": {"text": ["dog", "a cat", "cat of night"], "answer_start": [0, 1, 2]}},
    {"id": "y", "answers": {"text": ["nothing", "the"], "answer_start": [0, 0]}},
]


def test_metrics() -> None:
    """z is exact, of x the second answer is best, y was not answered but for the official script's empty article."""
    metrics = squad_metrics(PREDICTIONS, REFERENCES)
    assert metrics == {"exact_match": pytest.approx(200 / 3), "f1": pytest.approx(100 * (1 + 2 / 3) / 3)}
    assert squad_metrics(PREDICTIONS[::-1], REFERENCES[::-1]) == metrics


def test_metrics_with_unanswerable_questions() -> None:
    references = [*REFERENCES[:2], {"id": "y", "answers": {"text": [], "answer_start": []}}]
    assert squad_v2_metrics(PREDICTIONS, references) == {
        "exact": pytest.approx(200 / 3),
        "f1": pytest.approx(100 * (1 + 2 / 3 + 1) / 3),
        "total": 3,
        "HasAns_exact": 50,
        "HasAns_f1": pytest.approx(100 * (1 + 2 / 3) / 2),
        "HasAns_total": 2,
        "NoAns_exact": 100,
        "NoAns_f1": 100,
        "NoAns_total": 1,
    }
    answered = [*PREDICTIONS[::2], {"id": "y", "prediction_text": "nothing"}]
    assert squad_v2_metrics(answered, references)["NoAns_f1"] == 0
    # Beside a real answer an article alone does not count.
    assert squad_v2_metrics(PREDICTIONS, REFERENCES[2:])["exact"] == 0
    # An article alone is no answer, but the question counts as one that has some.
    metrics = squad_v2_metrics(PREDICTIONS, [{"id": "y", "answers": {"text": ["the"], "answer_start": [0]}}])
    assert metrics == {"exact": 100, "f1": 100, "total": 1, "HasAns_exact": 100, "HasAns_f1": 100, "HasAns_total": 1}


@pytest.mark.parametrize("metrics", [squad_metrics, squad_v2_metrics])
def test_metrics_need_pairs(metrics: Any) -> None:
    with pytest.raises(ValueError, match="Got 3, 1 of them without: y"):
        metrics(PREDICTIONS[::2], REFERENCES)
    with pytest.raises(ValueError, match="Got 0"):
        metrics(PREDICTIONS, [])

"""Sentences with labels: which columns and labels are found in official files and in files of one's own."""

import json
from pathlib import Path
from typing import Any

import pytest

from hf_dynsparse.data import GLUE_TASKS
from hf_dynsparse.data.classification import (
    SentenceArguments,
    find_columns,
    head_of,
    labels_of,
    load_sentences,
    tokenize_sentences,
)
from tests.data.test_glue import OFFICIAL
from tests.toy import toy_config, toy_tokenizer


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sentences")
    for task, about in GLUE_TASKS.items():
        header, row = OFFICIAL[task]
        (folder / "glue" / about.folder).mkdir(parents=True)
        for file in ("train", "dev_matched", "dev_mismatched") if task == "mnli" else ("train", "dev"):
            lines = [header] if header else []
            for number in range(4):
                label = f"{number}.5" if not about.labels else str(number % len(about.labels))
                cells: dict[Any, str] = dict(enumerate(row)) if not header else dict(zip(header, row, strict=True))
                cells |= dict.fromkeys(about.columns, f"w{number}") | {about.label: label}
                lines.append(list(cells.values()))
            path = folder / "glue" / about.folder / f"{file}.tsv"
            path.write_text("".join("\t".join(line) + "\n" for line in lines))
    own = [{"text": f"w{i}", "label": label} for i, label in enumerate(("good", "bad", "so-so"))]
    (folder / "own.json").write_text("".join(json.dumps(row) + "\n" for row in own))
    files = {
        "own.csv": "text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in own),
        "numbers.csv": "text,label\nw1,0.5\nw2,3\n",
        "null.csv": "text,label\nnull,NA\nw1 w2,none\nnan,NA\n",
        "whole.csv": "sentence1,sentence2,label\nw1,w2,0\nw1,w1,5\n",
        "unlabelled.csv": "text,mark\na,b\n",
        "ragged.csv": "text,label\na,b\nc,d,e\n",
        "header.csv": "text,label\n",
        "nolabel.csv": "text,label\nw1 w2,good\nw3,\n",
        "figures.csv": "figure,label\n1,good\n2,bad\n",
        "blank.jsonl": '{"text": "w1", "label": "a"}\n{"text": "  ", "label": "b"}\n',
        "null.jsonl": '{"text": "w1", "label": "a"}\n{"text": null, "label": "b"}\n',
        "hub/train.csv": "sentence,label\nw1,1\n",
        "stars.csv": "id,title,body,stars,label\n1,w1,w2,good,x\n2,w3,w4,bad,y\n",
        "new.csv": "id,body,title\n1,w2,w1\n",
    }
    (folder / "hub").mkdir()
    for name, content in files.items():
        (folder / name).write_text(content)
    (folder / "latin1.csv").write_bytes(b"text,label\ncaf\xe9,b\n")
    return folder


def prepare(data: Path, cache: Path, needed: tuple[str, ...] = ("train", "validation"), **given: Any) -> Any:
    """Columns, labels and tokenized examples of what is given, checked as a script does."""
    places = ("train_file", "validation_file", "glue_dir", "dataset_name")
    paths = {name: str(data / given.pop(name)) for name in places if name in given}
    args = SentenceArguments(max_seq_length=24, **paths, **given)
    args.check(needed)
    raw = load_sentences(args, cache_dir=str(cache))
    columns, labels = find_columns(raw, args, needed)
    return columns, labels, tokenize_sentences(raw, columns, labels, toy_tokenizer(), args)


@pytest.mark.parametrize("task", GLUE_TASKS)
def test_every_task(data: Path, tmp_path: Path, task: str) -> None:
    about = GLUE_TASKS[task]
    columns, labels, examples = prepare(data, tmp_path, glue_dir="glue", task_name=task.upper())
    assert (tuple(columns), tuple(labels)) == (about.sentences, about.labels)
    assert len(examples["train"]) == len(examples["validation"]) == 4
    assert len(set(examples["train"]["labels"])) == (len(labels) or 4)
    assert ("validation_mismatched" in examples) == (task == "mnli")


@pytest.mark.parametrize(
    ("file", "task", "labels", "ids"),
    [
        ("own.csv", None, ["bad", "good", "so-so"], [1, 0, 2]),
        ("own.json", None, ["bad", "good", "so-so"], [1, 0, 2]),
        ("numbers.csv", None, [], [0.5, 3.0]),
        ("null.csv", None, ["NA", "none"], [0, 1, 0]),  # words that others take for nothing
        ("whole.csv", "stsb", [], [0.0, 5.0]),  # numbers that others take for classes
    ],
)
def test_files_of_ones_own(
    data: Path, tmp_path: Path, file: str, task: str | None, labels: list[str], ids: list[float]
) -> None:
    found = prepare(data, tmp_path, train_file=file, validation_file=file, task_name=task)
    assert (found[1], found[2]["train"]["labels"][:]) == (labels, ids)
    assert found[2]["train"].features["labels"].dtype == ("int64" if labels else "float64")
    head = head_of(labels)
    assert head["problem_type"] == ("single_label_classification" if labels else "regression")
    assert (head["num_labels"], list(head["id2label"].values())) == (len(labels) or 1, labels or ["LABEL_0"])


@pytest.mark.parametrize(("names", "columns"), [(None, ["title", "body"]), ("body", ["body"])])
def test_columns_by_name(data: Path, tmp_path: Path, names: str | None, columns: list[str]) -> None:
    given = {"train_file": "stars.csv", "label_column_name": "stars", "text_column_names": names}
    found, labels, examples = prepare(data, tmp_path, ("train",), **given)
    assert (found, labels, examples["train"]["labels"][:]) == (columns, ["bad", "good"], [1, 0])
    words = toy_tokenizer().convert_ids_to_tokens(examples["train"]["input_ids"][0])
    assert [word for word in words if word[0] == "w"] == (["w1", "w2"] if names is None else ["w2"])


def test_new_sentences_for_a_model_that_knows_its_labels(data: Path, tmp_path: Path) -> None:
    args = SentenceArguments(test_file=str(data / "new.csv"), text_column_names="title,body")
    args.check(("test",))
    raw = load_sentences(args, cache_dir=str(tmp_path))
    config = toy_config(**head_of(["no", "yes"]))
    with pytest.raises(ValueError, match="or a model with a classification head"):
        find_columns(raw, args, ("test",), labels_of(config))
    config.architectures = ["DynSparseBertForSequenceClassification"]
    assert find_columns(raw, args, ("test",), labels_of(config)) == (["title", "body"], ["no", "yes"])
    config.id2label = {0: "LABEL_0"}
    assert labels_of(config) == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"task_name": "sst3"}, "must be one of cola, mnli"),
        ({}, "Give the data"),
        ({"glue_dir": "nowhere"}, "needs a `--task_name`"),
        ({"task_name": "sst2", "glue_dir": "nowhere"}, "train.tsv and dev.tsv in .*nowhere/SST-2. Got none"),
        ({"train_file": "own.csv", "needed": ("validation",)}, "`--do_eval` needs a `--validation_file`"),
        ({"train_file": "none.csv"}, "which does not exist"),
        ({"train_file": "glue"}, "must end in .csv"),
        ({"train_file": "own.csv", "validation_file": "own.json"}, "one format"),
        ({"train_file": "unlabelled.csv"}, "must have a column `label`. Got text, mark"),
        ({"train_file": "own.csv", "label_column_name": "stars"}, "a column `stars`. Got text in"),
        ({"train_file": "own.csv", "text_column_names": "txt"}, "must have the columns txt. Got text, label"),
        ({"train_file": "own.csv", "text_column_names": "a,b,c"}, "must name one or two columns"),
        ({"train_file": "own.csv", "text_column_names": "label"}, "other than that of the labels"),
        ({"train_file": "ragged.csv"}, "2 fields, as its header. Got 3 in line 3"),
        ({"train_file": "latin1.csv"}, "latin1.csv: byte 0xe9 in line 2"),
        ({"train_file": "header.csv"}, "at least one row. Got .*header.csv"),
        ({"train_file": "nolabel.csv"}, "nolabel.csv must have a `label`, one of good. Got no"),
        ({"train_file": "numbers.csv", "task_name": "sst2"}, "one of negative, positive. Got float"),
        ({"train_file": "blank.jsonl"}, "must hold text. Got '  ' in row 2"),
        ({"train_file": "null.jsonl"}, "Text must be strings: column `text` of .*null.jsonl"),
        ({"train_file": "figures.csv"}, "must have a column of text. Got figure, label"),
        ({"task_name": "sst2", "dataset_name": "hub", "needed": ("validation",)}, "needs rows of validation in .*hub"),
    ],
)
def test_data_that_is_refused(data: Path, tmp_path: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, OSError), match=message):
        prepare(data, tmp_path, **{"needed": ("train",), **given})

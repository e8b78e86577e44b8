"""Text for masked language modelling: flags that are refused, what is read, and the sequences that come of it."""

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from hf_dynsparse.data.files import DataError
from hf_dynsparse.data.pretraining import TextArguments, load_text, make_sequences
from tests.toy import toy_tokenizer


DOCUMENTS = [[f"w{i} w{j} w1 w2 ." for j in range(4)] for i in range(30)]
LINES = [line for document in DOCUMENTS for line in [*document, ""]]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One small text in every format, and texts that are none."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "train.txt").write_text("\n".join(LINES))
    (folder / "valid.txt").write_text("\n".join(LINES[:40]))
    with gzip.open(folder / "train.txt.gz", "wt") as file:
        file.write("\n".join(LINES))
    with open(folder / "train.csv", "w", newline="") as file:
        csv.writer(file).writerows([("id", "text"), *((str(i), line) for i, line in enumerate(LINES) if line)])
    rows = [{"text": "\n".join(document)} for document in DOCUMENTS]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    Dataset.from_list(rows).to_parquet(folder / "train.parquet")
    (folder / "null.jsonl").write_text('{"text": "one"}\n{"text": null}\n' + '{"text": "more"}\n' * 60)
    (folder / "lists.jsonl").write_text('{"text": ["one", "two"]}\n')
    (folder / "other.jsonl").write_text('{"sentence": "one"}\n')
    (folder / "numbers.csv").write_text("id,sentence\n1,one\n2,two\n")
    (folder / "late.jsonl").write_text("\n".join(['{"text": "w1 w2"}'] * 1200 + ['{"text": 3}']))
    return folder


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"validation_split_percentage": 0}, r"must lie in \[1, 99\]. Got 0"),
        ({"dataset_name": "a", "train_file": "b"}, "--dataset_name or --train_file"),
        ({"validation_file": "a.txt"}, "needs a --train_file"),
        ({"nsp": True, "streaming": True}, "leave out --line_by_line and --streaming"),
        ({"nsp": True, "line_by_line": True}, "leave out --line_by_line and --streaming"),
        ({"streaming": True}, "give --max_steps"),
        ({"max_seq_length": 4}, r"must lie in \[8, 512\]. Got 4"),
        ({"max_seq_length": 1000}, r"must lie in \[8, 512\]. Got 1000"),
        ({"mlm_probability": 1.5}, r"must lie in \(0, 1\). Got 1.5"),
        ({"train_file": "nothing.txt"}, "`--train_file` must be an existing file"),
    ],
)
def test_flags_that_cannot_work(given: dict[str, Any], message: str) -> None:
    TextArguments().check(max_steps=-1)
    with pytest.raises((ValueError, OSError), match=message):
        TextArguments(**given).check(max_steps=-1)


@pytest.mark.parametrize("file", ["train.txt", "train.txt.gz", "train.csv", "train.jsonl", "train.parquet"])
def test_every_format_holds_the_same_text(text: Path, tmp_path: Path, file: str) -> None:
    raw = load_text(
        TextArguments(train_file=str(text / file), validation_split_percentage=20), cache_dir=str(tmp_path)
    )
    assert list(raw) == ["validation", "train"] or list(raw) == ["train", "validation"]
    assert all(rows.column_names == ["text"] for rows in raw.values())
    assert 0.15 < len(raw["validation"]) / len(raw["train"]) < 0.3
    lines = [line for split in ("validation", "train") for row in raw[split] for line in row["text"].splitlines()]
    assert [line for line in lines if line] == [line for line in LINES if line]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"train_file": "null.jsonl"}, "null.jsonl. Got None in row 2"),
        ({"train_file": "null.jsonl", "validation_file": "valid.txt", "streaming": True}, "Got None in row 2"),
        (
            {"train_file": "numbers.csv", "text_column_name": "words"},
            "Got 'words' for .*numbers.csv with id",
        ),
        ({"train_file": "numbers.csv"}, "Got '?1'? in column `id` of .*numbers.csv, the first of id, sentence"),
        ({"train_file": "train.txt", "validation_file": "lists.jsonl"}, "lists.jsonl. Got list .* in row 1"),
        ({"train_file": "train.txt", "validation_file": "other.jsonl"}, "must have the column `text`. Got .*other"),
        ({"train_file": "valid.txt", "streaming": True}, "holds out the first 500 rows"),
    ],
)
def test_text_that_is_refused(text: Path, tmp_path: Path, given: dict[str, Any], message: str) -> None:
    args = {name: str(text / value) if name.endswith("_file") else value for name, value in given.items()}
    with pytest.raises(DataError, match=message):
        [*map(list, load_text(TextArguments(**args), cache_dir=str(tmp_path)).values())]


def sequences_of(text: Path, cache: Path, file: str = "train.txt", **flags: Any) -> dict[str, Any]:
    """With its flags, of a tokenizer that knows the words."""
    for name in [name for name in flags if name.endswith("_file")]:
        flags[name] = str(text / flags[name])
    args = TextArguments(**{"train_file": str(text / file), "max_seq_length": 16, **flags})
    return make_sequences(load_text(args, cache_dir=str(cache)), toy_tokenizer(), args)


def test_packed_text_loses_no_token(text: Path, tmp_path: Path) -> None:
    """Between the special tokens of its sequences stands the text, up to the tail."""
    tokenizer, sequences = toy_tokenizer(), sequences_of(text, tmp_path)
    flat = [token for ids in sequences["train"]["input_ids"] for token in ids[1:-1]]
    raw = load_text(TextArguments(train_file=str(text / "train.txt")), cache_dir=str(tmp_path))
    words = [token for row in raw["train"] for token in tokenizer(row["text"], add_special_tokens=False)["input_ids"]]
    assert flat == words[: len(flat)]
    assert 0 <= len(words) - len(flat) < 14
    for ids in sequences["train"]["input_ids"]:
        assert (len(ids), ids[0], ids[-1]) == (16, tokenizer.cls_token_id, tokenizer.sep_token_id)


def test_lines_pairs_streams_and_limits(text: Path, tmp_path: Path) -> None:
    lines = sequences_of(text, tmp_path, line_by_line=True, validation_file="valid.txt")["train"]["input_ids"]
    assert len(lines) == len([line for line in LINES if line])
    for file in ("train.txt", "train.jsonl"):  # an empty line ends a document, or the end of a row
        pairs = sequences_of(text, tmp_path, file, nsp=True, validation_split_percentage=20, max_seq_length=24)[
            "train"
        ]
        assert {0, 1} == set(pairs["next_sentence_label"])
        assert all(len(ids) <= 24 for ids in pairs["input_ids"])
    streamed = sequences_of(text, tmp_path, streaming=True, validation_file="valid.txt", max_train_samples=5)
    assert len([row["input_ids"] for row in streamed["train"]]) == 5
    assert len(sequences_of(text, tmp_path, max_eval_samples=1)["validation"]) == 1
    with pytest.raises(DataError, match="validation text must fill at least one sequence of 512 tokens. Got none"):
        sequences_of(text, tmp_path, validation_file="valid.txt", max_seq_length=512)


def test_long_lines_are_tokenized_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, lengths = toy_tokenizer(), []
    tokenize = type(tokenizer).__call__

    def watched(self: Any, lines: list[str], **arguments: Any) -> Any:
        lengths.extend(map(len, lines))
        return tokenize(self, lines, **arguments)

    monkeypatch.setattr(type(tokenizer), "__call__", watched)
    rows = Dataset.from_dict({"text": ["w1 w2 , w3 w4 " * 2000, "", "w5"]})
    raw = DatasetDict(train=rows, validation=rows)
    for flags, count in (({}, 10_001 // 28), ({"line_by_line": True}, 2), ({"nsp": True}, None)):
        data = TextArguments(max_seq_length=30, overwrite_cache=True, **flags)
        assert count in (None, len(make_sequences(raw, tokenizer, data)["train"])), flags
    assert max(lengths) <= 10_000


def test_a_stream_names_the_row_that_goes_wrong(text: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"late.jsonl. Got int 3 in row 1201\."):
        sequences_of(text, tmp_path, "late.jsonl", streaming=True, validation_file="valid.txt")


def test_flags_of_masking_reach_the_collator() -> None:
    flags = {"mlm_probability": 0.3, "whole_word_mask": False, "pad_to_max_length": True, "max_seq_length": 40}
    collator = TextArguments(**flags).collator(toy_tokenizer(), seed=7)
    assert (collator.mlm_probability, collator.whole_word_mask, collator.seed) == (0.3, False, 7)
    assert collator.pad_to_multiple_of == 40

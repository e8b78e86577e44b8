"""Texts of a file as batches to calibrate on."""

from pathlib import Path

import pytest
from datasets import Dataset
from toy import PAD, toy_tokenizer, without_post_processor

from hf_dynsparse.data.calibration import batches_of_rows, read_calibration


def test_lines_become_batches_of_similar_length(tmp_path: Path) -> None:
    lines = [f"w{number}" + " w1" * (number % 4) for number in range(40)]
    (tmp_path / "text.txt").write_text("\n\n".join(lines) + "\n")
    first, *_, last = batches = read_calibration(str(tmp_path / "text.txt"), toy_tokenizer(), 20, 5, batch_size=8)
    assert [len(batch["input_ids"]) for batch in batches] == [8, 8, 4]
    assert first.keys() == {"input_ids", "token_type_ids", "attention_mask"}
    assert {batch["input_ids"].shape[1] for batch in batches} <= {3, 5}  # with [CLS] and [SEP]; longer ones are cut
    for batch in batches:
        assert ((batch["input_ids"] != PAD) == batch["attention_mask"].bool()).all()
    # Every second line, from the first on.
    assert sorted(int(row[1]) - 5 for batch in batches for row in batch["input_ids"]) == list(range(0, 40, 2))


def test_a_tokenizer_without_padding(tmp_path: Path) -> None:
    tokenizer = without_post_processor(toy_tokenizer())
    tokenizer.pad_token = None
    (tmp_path / "text.txt").write_text("w1 w2\nw3\n")
    (batch,) = read_calibration(str(tmp_path / "text.txt"), tokenizer)
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]


def test_rows_that_are_trained_on() -> None:
    rows = [{"input_ids": [2, *[5 + number] * (1 + number % 2), 3], "labels": number} for number in range(8)]
    (batch,) = batches_of_rows(Dataset.from_list(rows), toy_tokenizer(), 4)
    assert batch["input_ids"].tolist() == [[2, 5 + number, 3] for number in (0, 2, 4, 6)]
    assert batch.keys() == {"input_ids", "attention_mask"}
    (batch, other) = batches_of_rows(Dataset.from_list(rows).to_iterable_dataset(), toy_tokenizer(), 3, batch_size=2)
    assert batch["input_ids"].tolist() == [[2, 6, 6, 3], [2, 5, 3, PAD]]
    assert (batch["attention_mask"].tolist()[1], other["input_ids"].tolist()) == ([1, 1, 1, 0], [[2, 7, 3]])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("text.txt", "\n \n", "`--calibration` must hold something"),
        (
            "text.csv",
            "text\n  \n",
            "`--calibration` must hold text. Got .*text.csv, without a word in its column `text`",
        ),
        ("text.pdf", "w1", "`--calibration` must end in .txt"),
    ],
)
def test_no_text(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_calibration(str(tmp_path / name), toy_tokenizer())

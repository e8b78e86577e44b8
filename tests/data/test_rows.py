"""Rows of a user: which texts and labels are refused, and the ids that labels become."""

from collections.abc import Iterator
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features, IterableDataset, Json, Value

from hf_dynsparse.data.files import DataError
from hf_dynsparse.data.rows import check_not_blank, check_splits, check_text, label_names, label_reader, looks_numeric


def rows_of(*values: Any, kind: Any = None, column: str = "label") -> Dataset:
    rows = Dataset.from_dict({column: list(values)})
    return rows if kind is None else rows.cast_column(column, kind)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("values", "got"),
    [
        (["a", None], "Got None in row 2"),
        ([None, None], "Got None in row 1"),
        ([1, 2], "Got int 1 in row 1"),
        ([1.5], "Got float 1.5 in row 1"),
        ([True], "Got bool True in row 1"),
        ([["a", "b"]], r"Got list \['a', 'b'\] in row 1"),
        ([{"a": "b"}], "Got dict .* in row 1"),
    ],
)
def test_text_that_is_none(values: list[Any], got: str, streaming: bool) -> None:
    def draw() -> Iterator[dict[str, Any]]:
        for value in values:
            yield {"text": value}

    rows = IterableDataset.from_generator(draw) if streaming else rows_of(*values, column="text")
    with pytest.raises(DataError, match=rf"column `text` of here\. {got}\. .*") as error:
        list(check_text(rows, "text", "here"))
    assert "\n" not in str(error.value)


def test_mixed_text_names_the_first_that_is_none() -> None:
    rows = Dataset.from_list([{"text": "a"}, {"text": 3}], features=Features({"text": Json()}))
    with pytest.raises(DataError, match="Got int 3 in row 2"):
        check_text(rows, "text", "here")


@pytest.mark.parametrize("streaming", [False, True])
def test_strings_pass_empty_ones_too(streaming: bool) -> None:
    rows = rows_of("a", "", "null", column="text")
    rows = rows.to_iterable_dataset() if streaming else rows
    assert [row["text"] for row in check_text(rows, "text", "here")] == ["a", "", "null"]


def test_an_example_without_a_word() -> None:
    check_not_blank([["a", ""], [" ", "b"]], [0, 1], "here")
    with pytest.raises(DataError, match="Got '' and ' ' in row 8"):
        check_not_blank([["a", ""], ["b", " "]], [6, 7], "here")


def test_what_looks_like_a_number() -> None:
    assert all(map(looks_numeric, (1, "2", "-3.5e2", True)))
    assert not any(map(looks_numeric, ("1 2", "", None, "one", [1])))


@pytest.mark.parametrize(
    ("splits", "names"),
    [
        ([rows_of("good", "bad", None, "")], ["bad", "good"]),
        ([rows_of(10, 9)], ["9", "10"]),
        ([rows_of(9), rows_of("x")], ["9", "x"]),
        ([rows_of(-1, 1)], ["-1", "1"]),
        ([rows_of(0.5)], []),
        ([rows_of(True, False)], ["False", "True"]),
        ([rows_of(None)], []),
        ([rows_of(1), rows_of(0.5)], []),
        ([rows_of(1, 0, kind=ClassLabel(names=["no", "yes"]))], ["no", "yes"]),
    ],
)
def test_names_of_classes(splits: list[Dataset], names: list[str]) -> None:
    assert label_names(dict(zip(("train", "validation"), splits, strict=False)), "here") == names


def test_labels_that_are_lists_are_refused() -> None:
    with pytest.raises(DataError, match=r"Got list \[1\] in train of here"):
        label_names({"train": rows_of([1])}, "here")


@pytest.mark.parametrize(
    ("rows", "names", "ids"),
    [
        (rows_of("good", "bad"), ["bad", "good"], [1, 0]),
        (rows_of(10, 9), ["9", "10"], [1, 0]),
        (rows_of("1", "yes"), ["no", "yes"], [1, 1]),  # a task's label may be its name or its number
        (rows_of(0, 1), ["no", "yes"], [0, 1]),
        (rows_of(0.0, 1.0), ["no", "yes"], [0, 1]),
        (rows_of(1, 0, kind=ClassLabel(names=["1", "0"])), ["1", "0"], [1, 0]),  # ids are ids
        (rows_of(3, 4), [], [3.0, 4.0]),  # a whole number may be one to predict
        (rows_of("3.5"), [], [3.5]),
    ],
)
def test_ids(rows: Dataset, names: list[str], ids: list[float]) -> None:
    read = label_reader(rows, names, "here")
    assert [read(label, index) for index, label in enumerate(rows["label"])] == ids


@pytest.mark.parametrize(
    ("rows", "names", "got"),
    [
        (rows_of("no", None), ["no", "yes"], "one of no, yes. Got no label in row 2"),
        (rows_of(""), ["no", "yes"], "no label in row 1"),
        (rows_of("maybe"), ["no", "yes"], "Got 'maybe' in row 1"),
        (rows_of(2), ["no", "yes"], "Got int 2"),
        (rows_of(0.5), ["no", "yes"], "Got float 0.5"),
        (rows_of(1, -1, kind=ClassLabel(names=["no", "yes"])), ["no", "yes"], "no label in row 2"),
        (rows_of(0.5, None), [], "a number. Got no label in row 2"),
        (rows_of(float("nan"), kind=Value("float32")), [], "no label"),
        (rows_of(float("inf")), [], "Got float inf"),
        (rows_of("much"), [], "Got 'much'"),
        (rows_of(None), [], "no label"),
    ],
)
def test_labels_that_are_missing_or_wrong(rows: Dataset, names: list[str], got: str) -> None:
    read = label_reader(rows, names, "here")
    with pytest.raises(DataError, match=f"Each row of here must have a `label`, .*{got}"):
        [read(label, index) for index, label in enumerate(rows["label"])]


def test_splits_that_a_run_needs() -> None:
    splits = {"train": rows_of(1), "validation": rows_of()}
    check_splits(splits, {"train": "--do_train"}, "here")
    for split, got in (("test", "only train, validation"), ("validation", "validation without a row")):
        with pytest.raises(DataError, match=f"`--do_it` needs rows of {split} in here. Got {got}"):
            check_splits(splits, {split: "--do_it"}, "here")

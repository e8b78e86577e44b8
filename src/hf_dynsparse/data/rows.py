"""Rows of a user's data: texts that must be strings, labels that must be there, and the ids that labels become."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from datasets import Dataset, IterableDataset, Value

from .files import DataError


SHOWN = 40  # characters of a value in an error


def check_text(rows: Dataset | IterableDataset, column: str, source: str) -> Dataset | IterableDataset:
    """
    The rows, of which each is known to have a string in `column`: an empty one may be. Rows that are read while
    training are looked at when their turn comes, others by what the column is and how many values it lacks.

    Raises:
        ValueError: naming the first row, from 1, that holds something else.
    """
    if isinstance(rows, IterableDataset):
        return rows.map(_checked, batched=True, with_indices=True, fn_kwargs={"column": column, "source": source})
    dtype = getattr(rows.features[column], "dtype", None)
    if dtype not in ("string", "large_string") or rows.data.column(column).null_count:
        for number, row in enumerate(rows.select_columns([column]), start=1):
            _check_string(row[column], number, column, source)
    return rows


def _checked(batch: dict[str, list[Any]], numbers: list[int], column: str, source: str) -> dict[str, list[Any]]:
    for number, value in zip(numbers, batch[column], strict=True):
        _check_string(value, number + 1, column, source)
    return batch


def _check_string(value: Any, number: int, column: str, source: str) -> None:
    if not isinstance(value, str):
        raise DataError(
            f"Text must be strings: column `{column}` of {source}. Got {shown(value)} in row {number}. Correct it, "
            "leave the row out, or name the column of text by `--text_column_name`."
        )


def check_not_blank(texts: Sequence[Sequence[str]], indices: Sequence[int], source: str) -> None:
    """
    Refuse an example without a word.

    Args:
        texts (`Sequence[Sequence[str]]`): columns of text.
        indices (`Sequence[int]`): where the rows stand, from 0.
        source (`str`): what the data is called in the error.

    Raises:
        ValueError: naming the row, from 1.
    """
    for index, *parts in zip(indices, *texts, strict=True):
        if not any(part.strip() for part in parts):
            raise DataError(
                f"Each row of {source} must hold text. Got {' and '.join(map(repr, parts))} in row {index + 1}. Leave "
                "the row out."
            )


def shown(value: Any) -> str:
    """A value in an error: its type and how it begins."""
    words = repr(value)
    words = words if len(words) <= SHOWN else f"{words[:SHOWN]}…"
    return words if value is None or isinstance(value, str) else f"{type(value).__name__} {words}"


def label_names(splits: Mapping[str, Dataset], source: str) -> list[str]:
    """
    Names of the classes of a column `label` in the order of their ids; none if it holds numbers to predict.

    Raises:
        ValueError: if it holds something else than words and numbers.
    """
    features = [rows.features["label"] for rows in splits.values()]
    for feature in features:
        if hasattr(feature, "names"):
            return list(feature.names)
    if any("float" in getattr(feature, "dtype", "") for feature in features):
        return []
    known: dict[str, Any] = {}
    for split, rows in splits.items():
        if not isinstance(rows.features["label"], Value):
            raise DataError(
                f"Labels must be words or numbers. Got {shown(rows[0]['label'])} in {split} of {source}. Correct them."
            )
        known |= {str(label): label for label in rows.unique("label") if not _is_missing(label)}
    # Files may differ in what their columns are taken for: numbers here, strings there.
    return sorted(known, key=lambda name: (isinstance(known[name], str), known[name]))


def label_reader(rows: Dataset, names: Sequence[str], source: str) -> Callable[[Any, int], int | float]:
    """
    What turns a value of column `label` of `rows`, and its index, into an id, or a number if there are no `names`.

    Raises:
        ValueError: from what is returned, for a label that is missing, unknown or no number, naming the row, from 1.
    """
    ids = {name: number for number, name in enumerate(names)}
    are_ids = hasattr(rows.features["label"], "names")
    rule = f"one of {', '.join(names)}" if names else "a number"

    def read(value: Any, index: int) -> int | float:
        label = None if _is_missing(value) or (are_ids and value == -1) else value
        if label is not None and names and not are_ids and str(label) in ids:
            return ids[str(label)]
        number = _number(label)
        if math.isfinite(number) and not names:
            return number
        if number in range(len(names)):
            return int(number)
        got = "no label" if label is None else shown(label)
        raise DataError(
            f"Each row of {source} must have a `label`, {rule}. Got {got} in row {index + 1}. Correct it, or leave "
            "the row out."
        )

    return read


def looks_numeric(value: Any) -> bool:
    """Whether a value is a number, or a string that is one."""
    return not math.isnan(_number(value))


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip()) or value != value


def _number(value: Any) -> float:
    """A value as a number; NaN if it is none."""
    try:
        return math.nan if value is None else float(value)
    except (ValueError, TypeError):
        return math.nan


def check_splits(splits: Mapping[str, Dataset], wanted: Mapping[str, str], source: str) -> None:
    """
    Refuse data without what a run reads.

    Args:
        splits (`Mapping[str, Dataset]`): what there is.
        wanted (`Mapping[str, str]`): for each split that is needed the flag that asks for it.
        source (`str`): what the data is called in an error.

    Raises:
        ValueError: for a split that is missing or holds no row.
    """
    for split, flag in wanted.items():
        if split not in splits or not len(splits[split]):
            got = f"only {', '.join(splits)}" if split not in splits else f"{split} without a row"
            raise DataError(f"`{flag}` needs rows of {split} in {source}. Got {got}. Give them, or `{flag} false`.")

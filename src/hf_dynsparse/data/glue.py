"""The nine GLUE tasks: what their columns are, how their files are read, and what they are scored by."""

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Value

from .files import DataError, reading


@dataclass(frozen=True)
class GlueTask:
    """
    One task (arXiv:1804.07461, section 3).

    Attributes:
        folder: name of its folder in the official download.
        sentences: columns of the data set on the Hub.
        columns: where they stand in the official files: names of the header, or positions if there is none.
        label: column of the label, likewise.
        labels: names of the classes in the order of their ids, as on the Hub; none for regression.
        metrics: keys of `METRICS`; the first one decides which checkpoint is best.
        splits: split of the data set, by the name of its file without the ending.
    """

    folder: str
    sentences: tuple[str, ...]
    columns: tuple[str | int, ...]
    label: str | int
    labels: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    splits: Mapping[str, str] | None = None

    @property
    def is_regression(self) -> bool:
        """Whether the label is a number."""
        return not self.labels


_ENTAILMENT = ("entailment", "not_entailment")
_PAIR = ("sentence1", "sentence2")
_SPLITS = {"train": "train", "dev": "validation", "test": "test"}
_MNLI_SPLITS = _SPLITS | {
    f"{file}_{part}": f"{split}_{part}"
    for file, split in (("dev", "validation"), ("test", "test"))
    for part in ("matched", "mismatched")
}

GLUE_TASKS = {
    "cola": GlueTask("CoLA", ("sentence",), (3,), 1, ("unacceptable", "acceptable"), ("matthews_correlation",)),
    "mnli": GlueTask(
        "MNLI",
        ("premise", "hypothesis"),
        _PAIR,
        "gold_label",
        ("entailment", "neutral", "contradiction"),
        splits=_MNLI_SPLITS,
    ),
    "mrpc": GlueTask(
        "MRPC",
        _PAIR,
        ("#1 String", "#2 String"),
        "Quality",
        ("not_equivalent", "equivalent"),
        ("f1", "accuracy"),
    ),
    "qnli": GlueTask("QNLI", ("question", "sentence"), ("question", "sentence"), "label", _ENTAILMENT),
    "qqp": GlueTask(
        "QQP",
        ("question1", "question2"),
        ("question1", "question2"),
        "is_duplicate",
        ("not_duplicate", "duplicate"),
        ("f1", "accuracy"),
    ),
    "rte": GlueTask("RTE", _PAIR, _PAIR, "label", _ENTAILMENT),
    "sst2": GlueTask("SST-2", ("sentence",), ("sentence",), "label", ("negative", "positive")),
    "stsb": GlueTask("STS-B", _PAIR, _PAIR, "score", (), ("pearson", "spearmanr")),
    "wnli": GlueTask("WNLI", _PAIR, _PAIR, "label", ("not_entailment", "entailment")),
}


def read_glue(folder: str | Path, task: str) -> DatasetDict:
    """
    The splits of one task from the official tab-separated files in `folder`, with the columns of the Hub's `glue`:
    the sentences, `label` (class id, or `float32` for STS-B; -1 or absent in test files) and `idx`.

    Raises:
        FileNotFoundError: if there is no training or development file.
        ValueError: for a file without the task's columns, a row without its fields, or an unknown label.
    """
    return DatasetDict(
        {
            split: _read_tsv(file, GLUE_TASKS[task], has_labels=not split.startswith("test"))
            for split, file in glue_files(folder, task).items()
        }
    )


def glue_files(folder: str | Path, task: str) -> dict[str, Path]:
    """
    The official files of one task by split.

    Raises:
        FileNotFoundError: if there is no training or development file.
    """
    about = GLUE_TASKS[task]
    path = Path(folder) / about.folder
    files = {split: path / f"{file}.tsv" for file, split in (about.splits or _SPLITS).items()}
    files = {split: file for split, file in files.items() if file.is_file()}
    if not files.keys() - {"test"}:
        raise FileNotFoundError(
            f"`{task}` must have files such as train.tsv and dev.tsv in {path}. Got none. Give the folder that holds "
            f"{about.folder}/, as in the official download."
        )
    return files


def _read_tsv(file: Path, task: GlueTask, *, has_labels: bool) -> Dataset:
    # Nothing is quoted, and only `\n` ends a line: sentences hold single quotes and exotic line separators.
    with reading(str(file)):
        text = file.read_text(encoding="utf-8-sig")
    rows = [line.split("\t") for line in text.removesuffix("\n").split("\n")]
    wanted = dict(zip(task.sentences, task.columns, strict=True)) | {"label": task.label}
    without_header = isinstance(task.label, int) and has_labels
    if without_header:
        positions = {column: int(place) for column, place in wanted.items()}
    else:
        header = [name.strip() for name in rows.pop(0)]
        if not has_labels:
            del wanted["label"]
        # Test files of a task without headers have one, with the Hub's names.
        names = {column: name if isinstance(name, str) else column for column, name in wanted.items()}
        missing = [name for name in names.values() if name not in header]
        if missing:
            raise ValueError(f"{file} must have the columns {list(names.values())}. Got {header}: {missing} missing.")
        positions = {column: header.index(name) for column, name in names.items()}
    fields = max(positions.values()) + 1
    first = 1 if without_header else 2
    if not rows:
        raise DataError(f"Data must hold at least one row. Got {file}, which holds none. Download it again.")
    for number, row in enumerate(rows, start=first):
        if len(row) < fields:
            raise ValueError(
                f"Each line of {file} must have at least {fields} fields between tabs. "
                f"Got {len(row)} in line {number}."
            )
    columns: dict[str, list] = {name: [row[place].strip() for row in rows] for name, place in positions.items()}
    columns["label"] = (
        [_as_label(text, task, file, number) for number, text in enumerate(columns["label"], start=first)]
        if has_labels
        else [-1] * len(rows)
    )
    columns["idx"] = list(range(len(rows)))
    kind = Value("float32") if task.is_regression else ClassLabel(names=list(task.labels))
    return Dataset.from_dict(columns).cast_column("label", kind)


def _as_label(text: str, task: GlueTask, file: Path, line: int) -> float | int:
    if task.is_regression:
        with contextlib.suppress(ValueError):
            if math.isfinite(float(text)):
                return float(text)
        raise DataError(f"Labels of {file} must be numbers. Got {text!r} in line {line}. Correct it.")
    if text in task.labels:
        return task.labels.index(text)
    if text.isdecimal() and int(text) < len(task.labels):
        return int(text)
    raise DataError(
        f"Labels of {file} must be among {', '.join(task.labels)}. Got {text!r} in line {line}. Correct it."
    )


def glue_metrics(task: str, predictions: Sequence[float], references: Sequence[float]) -> dict[str, float]:
    """
    The scores of a task by scikit-learn and scipy, under the names and in the units of `evaluate`'s `glue`: shares and
    correlations, not percent.

    Args:
        task (`str`): a key of `GLUE_TASKS`.
        predictions, references (`Sequence` of length `rows`): class ids, or numbers for STS-B.
    """
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    compute: dict[str, Any] = {
        "accuracy": accuracy_score,
        "f1": f1_score,
        "matthews_correlation": matthews_corrcoef,
        "pearson": lambda references, predictions: pearsonr(references, predictions)[0],
        "spearmanr": lambda references, predictions: spearmanr(references, predictions)[0],
    }
    truth, found = np.asarray(references), np.asarray(predictions)
    return {name: float(compute[name](truth, found)) for name in GLUE_TASKS[task].metrics}

"""Sentences with labels: the flags that name them, reading them, and tokenizing them."""

import logging
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from .files import SPLIT_FLAGS, DataError, check_file, check_needed, ending_of, read_file, reading, row_limits
from .glue import GLUE_TASKS, glue_files, read_glue
from .rows import check_not_blank, check_splits, check_text, label_names, label_reader


logger = logging.getLogger(__name__)

FILE_ENDINGS = ("csv", "tsv", "json", "jsonl", "parquet")
TRANSFER = "transfer"  # the split of text that a teacher labels


@dataclass
class SentenceArguments:
    """What it is fine-tuned on."""

    task_name: str | None = field(default=None, metadata={"help": f"GLUE task: {', '.join(GLUE_TASKS)}."})
    glue_dir: str | None = field(
        default=None, metadata={"help": "Folder with the official files: CoLA/train.tsv, SST-2/train.tsv, ..."}
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "Data set on the Hub or in a folder. Default with --task_name: nyu-mll/glue."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of that data set."})
    train_file: str | None = field(
        default=None,
        metadata={"help": "Local .csv, .tsv, .json, .jsonl or .parquet, plain or .gz, with text and labels."},
    )
    validation_file: str | None = field(default=None, metadata={"help": "The same for evaluation."})
    test_file: str | None = field(default=None, metadata={"help": "The same for prediction; labels not needed."})
    transfer_file: str | None = field(
        default=None,
        metadata={
            "help": "With --teacher: more text of the task's kind in the same columns, without labels; the teacher's "
            "answers are its labels, and it is trained on beside the rest."
        },
    )
    text_column_names: str | None = field(
        default=None,
        metadata={
            "help": "The column of text, or two with a comma between them for pairs. Default: sentence1,sentence2, or "
            "the first one or two columns of strings.",
            "aliases": ["--text_column_name"],
        },
    )
    label_column_name: str = field(
        default="label", metadata={"help": "The column of labels: words, whole numbers, or fractions to predict."}
    )
    metric_path: str | None = field(
        default=None, metadata={"help": "Folder with the script of `evaluate`'s metric, to do without the Hub."}
    )
    max_seq_length: int = field(default=128, metadata={"help": "Tokens per example; longer ones are cut."})
    pad_to_max_length: bool = field(
        default=False, metadata={"help": "Pad to --max_seq_length instead of the longest of a batch."}
    )
    overwrite_cache: bool = field(default=False, metadata={"help": "Prepare the data again."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only so many examples for training."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only so many for evaluation."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "Use only so many for prediction."})
    language: str | None = field(
        default=None, metadata={"help": "Language of the texts, for the card; that of --task_name is en."}
    )

    @property
    def files(self) -> dict[str, str]:
        """The local files that are given, by split."""
        files = {"train": self.train_file, "validation": self.validation_file, "test": self.test_file}
        return {split: file for split, file in files.items() if file is not None}

    @property
    def text_columns(self) -> list[str]:
        """The columns of text that are given."""
        return [name.strip() for name in (self.text_column_names or "").split(",") if name.strip()]

    def check(self, needed: Collection[str]) -> None:
        """
        Refuse what cannot work before anything is read.

        Args:
            needed (`Collection[str]`): the splits that the run reads, of `"train"`, `"validation"` and `"test"`.

        Raises:
            ValueError: naming the flag.
        """
        if self.task_name is not None:
            self.task_name = self.task_name.lower().replace("-", "")
            if self.task_name not in GLUE_TASKS:
                raise ValueError(f"`--task_name` must be one of {', '.join(GLUE_TASKS)}. Got {self.task_name!r}.")
        if self.glue_dir is not None:
            if self.task_name is None:
                raise ValueError("`--glue_dir` needs a `--task_name`. Got none.")
            glue_files(self.glue_dir, self.task_name)
        if not any((self.task_name, self.dataset_name, self.files)):
            raise ValueError(
                "Give the data: `--task_name`, `--dataset_name`, or `--train_file` and `--validation_file`."
            )
        if len(self.text_columns) > 2 or self.label_column_name in self.text_columns:
            raise ValueError(
                "`--text_column_names` must name one or two columns, other than that of the labels. Got "
                f"{self.text_column_names!r} beside {self.label_column_name!r}."
            )
        for split, file in self.files.items():
            check_file(file, f"--{split}_file", FILE_ENDINGS)
        if len({ending_of(file) for file in self.files.values()}) > 1:
            raise ValueError(f"The files must have one format. Got {', '.join(self.files.values())}.")
        check_needed(self.files, needed)
        if self.transfer_file is not None:
            check_file(self.transfer_file, "--transfer_file", FILE_ENDINGS)
        if self.max_seq_length < 8:
            raise ValueError(f"`--max_seq_length` must be at least 8. Got {self.max_seq_length}.")

    def source(self, split: str = "") -> str:
        """What the data of a split, or all of it, is called in an error."""
        file = self.transfer_file if split == TRANSFER else self.files.get(split)
        name = file or self.dataset_name or self.glue_dir or self.task_name or "the files"
        return name if file or not split else f"{split} of {name}"


def load_sentences(args: SentenceArguments, *, cache_dir: str | None = None, token: str | None = None) -> DatasetDict:
    """
    The splits as they are: sentences and labels, whose column is called `label`. One more, `TRANSFER`, has text alone.

    Raises:
        ValueError: if a file cannot be read, naming it.
    """
    raw = _read(args, cache_dir, token)
    named = DatasetDict({split: _with_label(rows, args.label_column_name) for split, rows in raw.items()})
    if args.transfer_file is not None:
        named[TRANSFER] = read_file(args.transfer_file, TRANSFER, cache_dir)
    return named


def _with_label(rows: Dataset, column: str) -> Dataset:
    """Rows whose `column` is called `label`; another of that name is left out."""
    if column == "label":
        return rows
    rows = rows.remove_columns([name for name in rows.column_names if name == "label"])
    return rows.rename_column(column, "label") if column in rows.column_names else rows


def _read(args: SentenceArguments, cache_dir: str | None, token: str | None) -> DatasetDict:
    if args.files:
        return DatasetDict({split: read_file(file, split, cache_dir) for split, file in args.files.items()})
    if args.glue_dir is not None and args.task_name is not None:
        raw = read_glue(args.glue_dir, args.task_name)
    else:
        name = args.dataset_name or "nyu-mll/glue"
        config = args.dataset_config_name or (args.task_name if args.dataset_name is None else None)
        with reading(name):
            raw = load_dataset(name, config, cache_dir=cache_dir, token=token)
    for split in ("validation", "test"):  # MNLI has two of each; the matched ones come first
        if split not in raw and f"{split}_matched" in raw:
            raw[split] = raw.pop(f"{split}_matched")
    return raw


def find_columns(
    raw: DatasetDict, args: SentenceArguments, needed: Collection[str], known: list[str] | None = None
) -> tuple[list[str], list[str]]:
    """
    The one or two columns of text, and the names of the labels, none for regression; both known to be there.

    Args:
        needed (`Collection[str]`): the splits that the run reads.
        known (`list[str]`, *optional*): the labels, if a model knows them: see [`labels_of`].

    Raises:
        ValueError: for a split, a column or a text that is missing, naming it.
    """
    check_splits(raw, {split: SPLIT_FLAGS[split] for split in needed}, args.source())
    labelled = {split: rows for split, rows in raw.items() if is_labelled(split)}
    for split, rows in labelled.items():
        if "label" not in rows.column_names:
            raise DataError(
                f"The data must have a column `{args.label_column_name}`. Got {', '.join(rows.column_names)} in "
                f"{args.source(split)}. Name the column of labels by `--label_column_name`."
            )
    first = next(iter(raw.values()))
    task = GLUE_TASKS[args.task_name] if args.task_name is not None else None
    is_official = task is not None and set(task.sentences) <= set(first.column_names)
    of_task = list(task.sentences) if task is not None and is_official else []
    columns = args.text_columns or of_task or _text_columns(first, args.source())
    for split, rows in raw.items():
        if set(columns) - set(rows.column_names):
            raise DataError(
                f"All data must have the columns {', '.join(columns)}. Got {', '.join(rows.column_names)} in "
                f"{args.source(split)}. Name them alike, or give others by `--text_column_names`."
            )
        for column in columns:
            check_text(rows, column, args.source(split))
    if task is not None:
        return columns, list(task.labels)
    if known is not None:
        return columns, known
    if not labelled:
        raise DataError(
            "Labels must be known from a `--train_file`, a `--validation_file` or a model with a classification head. "
            "Got none of them. Give one."
        )
    return columns, label_names(labelled, args.source())


def is_labelled(split: str) -> bool:
    """Whether a split is trained on or evaluated, and so must have labels."""
    return split.split("_")[0] in ("train", "validation")


def _text_columns(rows: Dataset, source: str) -> list[str]:
    """The one or two columns of text in data of one's own."""
    text = [name for name in rows.column_names if name not in ("label", "idx", "id")]
    named = [name for name in ("sentence1", "sentence2", "text") if name in text]
    strings = [name for name in text if getattr(rows.features[name], "dtype", "") in ("string", "large_string")]
    if {"sentence1", "sentence2"} <= set(named):
        return named[:2]
    columns = strings[:2] or named[:1]
    if not columns:
        raise DataError(
            f"The data must have a column of text. Got {', '.join(rows.column_names)} in {source}, none of strings. "
            "Write the text as strings."
        )
    return columns


def labels_of(config: PretrainedConfig) -> list[str] | None:
    """The labels of a fine-tuned model, none if it predicts a number; `None` if it is no classifier of sequences."""
    if not any(name.endswith("ForSequenceClassification") for name in config.architectures or ()):
        return None
    names: Any = config.id2label
    return [] if len(names) == 1 else [names[number] for number in sorted(names)]


def head_of(labels: list[str]) -> dict[str, Any]:
    """What a configuration says of a head for `labels`, or for a number if there are none."""
    names = labels or ["LABEL_0"]
    return {
        "num_labels": len(names),
        "problem_type": "single_label_classification" if labels else "regression",
        "id2label": dict(enumerate(names)),
        "label2id": {label: number for number, label in enumerate(names)},
    }


def tokenize_sentences(
    raw: DatasetDict,
    columns: list[str],
    labels: list[str],
    tokenizer: PreTrainedTokenizerBase,
    args: SentenceArguments,
) -> DatasetDict:
    """
    Token ids, and ids of `labels` (or numbers) where they are trained on or evaluated.

    Raises:
        ValueError: for a row without text or with a label that is unknown, naming it.
    """
    length = min(args.max_seq_length, tokenizer.model_max_length)
    if length < args.max_seq_length:
        logger.warning("`--max_seq_length` %d is more than the tokenizer is for: %d.", args.max_seq_length, length)
    limits = row_limits(args)
    padding = "max_length" if args.pad_to_max_length else False
    prepared = {}
    for split, rows in raw.items():
        limit = limits.get(split.split("_")[0])
        if limit is not None:
            rows = rows.select(range(min(limit, len(rows))))
        source = args.source(split)
        read = label_reader(rows, labels, source) if is_labelled(split) else None

        def prepare(
            batch: dict[str, list[Any]], indices: list[int], read: Any = read, source: str = source
        ) -> dict[str, list[Any]]:
            text = [batch[name] for name in columns]
            check_not_blank(text, indices, source)
            prepared = dict(tokenizer(*text, max_length=length, truncation=True, padding=padding))
            if read is not None:
                # Not `label`: that column keeps the type that it had.
                prepared["labels"] = [read(*each) for each in zip(batch["label"], indices, strict=True)]
            return prepared

        prepared[split] = rows.map(
            prepare,
            batched=True,
            with_indices=True,
            remove_columns=rows.column_names,
            load_from_cache_file=not args.overwrite_cache,
            desc=f"tokenize {split}",
        )
    return DatasetDict(prepared)

"""Questions about texts: the flags that name them and say how they are answered, reading, windows, and answers."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
from datasets import Dataset, load_dataset
from transformers import PreTrainedTokenizerBase

from .files import DataError, check_file, check_needed, ending_of, read_file, reading, row_limits
from .question_answering import SquadAnswers, squad_answers, squad_evaluation_features, squad_training_features
from .squad import check_squad_rows, read_squad_file


FILE_ENDINGS = ("json", "jsonl", "parquet")


@dataclass
class QuestionArguments:
    """What it is fine-tuned on, and how questions are answered."""

    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Data set on the Hub or in a folder: columns id, context, question and answers."},
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of that data set."})
    train_file: str | None = field(
        default=None,
        metadata={"help": "Local .json or .jsonl, plain or .gz: official layout or rows; or .parquet with rows."},
    )
    validation_file: str | None = field(default=None, metadata={"help": "The same for evaluation."})
    test_file: str | None = field(default=None, metadata={"help": "The same for prediction; answers not needed."})
    metric_path: str | None = field(
        default=None, metadata={"help": "Folder with the script of `evaluate`'s metric, to do without the Hub."}
    )
    max_seq_length: int = field(
        default=384, metadata={"help": "Tokens of a window: question, part of the context, special tokens."}
    )
    doc_stride: int = field(
        default=128, metadata={"help": "Tokens of context that two neighbouring windows share, less than a window."}
    )
    pad_to_max_length: bool = field(
        default=False, metadata={"help": "Pad to --max_seq_length instead of the longest of a batch."}
    )
    version_2_with_negative: bool = field(
        default=False, metadata={"help": "Questions may have no answer (SQuAD 2.0), and the model may give none."}
    )
    null_score_diff_threshold: float = field(
        default=0.0,
        metadata={"help": "With that: give none where its logits exceed those of the best answer by more than this."},
    )
    n_best_size: int = field(default=20, metadata={"help": "Answers to each question in the file of n best ones."})
    max_answer_length: int = field(default=30, metadata={"help": "Most tokens of an answer."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only so many questions for training."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only so many for evaluation."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "Use only so many for prediction."})
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes that prepare the data."})
    overwrite_cache: bool = field(default=False, metadata={"help": "Prepare the data again."})
    language: str | None = field(default=None, metadata={"help": "Language of the texts, for the card, e.g. en."})

    @property
    def files(self) -> dict[str, str]:
        """The local files that are given, by split."""
        files = {"train": self.train_file, "validation": self.validation_file, "test": self.test_file}
        return {split: file for split, file in files.items() if file}

    def check(self, needed: Collection[str]) -> None:
        """
        Refuse what cannot work before anything is read.

        Args:
            needed (`Collection[str]`): the splits that the run reads, of `"train"`, `"validation"` and `"test"`.

        Raises:
            ValueError: naming the flag.
        """
        if self.dataset_name and self.files:
            raise ValueError("Give --dataset_name or files, not both.")
        if not self.dataset_name and not self.files:
            raise ValueError("Give the data: `--dataset_name`, or `--train_file` and `--validation_file`. Got none.")
        for split, file in self.files.items():
            check_file(file, f"--{split}_file", FILE_ENDINGS)
        if not needed:
            raise ValueError("There must be something to do: `--do_train`, `--do_eval` or `--do_predict`. Got none.")
        check_needed(self.files, needed)
        for name in ("n_best_size", "max_answer_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"`--{name}` must be positive. Got {getattr(self, name)}.")


def load_questions(
    args: QuestionArguments, needed: Collection[str], *, cache_dir: str | None = None, token: str | None = None
) -> dict[str, Dataset]:
    """
    The splits that the run needs, checked: a row a question.

    Raises:
        ValueError: if a file cannot be read, or a row is not as it must be, naming it.
    """
    limits = row_limits(args)
    found = None
    if args.dataset_name:
        with reading(args.dataset_name):
            found = load_dataset(args.dataset_name, args.dataset_config_name, cache_dir=cache_dir, token=token)
    rows = {}
    for split in needed:
        if found is not None and split not in found:
            raise DataError(f"`--dataset_name` must have a split {split}. Got {', '.join(found)}.")
        chosen = _read(args.files[split], cache_dir) if found is None else found[split]
        limit = limits[split]
        if limit is not None:
            chosen = chosen.select(range(min(limit, len(chosen))))
        check_squad_rows(chosen, split, needs_answers=split != "test", may_lack_answers=args.version_2_with_negative)
        rows[split] = chosen
    return rows


def _read(path: str, cache_dir: str | None) -> Dataset:
    """The rows of a local file, kept on disk until the file changes."""
    return read_file(path, "train", cache_dir) if ending_of(path) == "parquet" else read_squad_file(path, cache_dir)


def make_windows(split: str, rows: Dataset, tokenizer: PreTrainedTokenizerBase, args: QuestionArguments) -> Dataset:
    """Windows of tokens; for evaluation and prediction with what is needed to find the answers again."""
    # Whatever answers a test set has, nothing is learned or told from them.
    columns = ["id", "context", "question", *(["answers"] if split != "test" else [])]
    return rows.select_columns(columns).map(
        squad_training_features if split == "train" else squad_evaluation_features,
        fn_kwargs={"tokenizer": tokenizer, "max_seq_length": args.max_seq_length, "doc_stride": args.doc_stride},
        batched=True,
        remove_columns=columns,
        num_proc=args.preprocessing_num_workers,
        load_from_cache_file=not args.overwrite_cache,
        desc=f"tokenize {split}",
    )


def only_inputs(windows: Dataset) -> Dataset:
    """The windows without what the model does not take."""
    return windows.remove_columns(["example_id", "offset_mapping"])


def answerer(
    rows: Dataset, windows: Dataset, args: QuestionArguments
) -> Callable[[Sequence[np.ndarray]], SquadAnswers]:
    """What turns start and end logits of all windows into answers."""
    questions = rows.select_columns(["id", "context"])
    places = windows.select_columns(["example_id", "offset_mapping"])

    def answer(logits: Sequence[np.ndarray]) -> SquadAnswers:
        return squad_answers(
            questions,
            places,
            *logits[:2],
            n_best_size=args.n_best_size,
            max_answer_length=args.max_answer_length,
            null_threshold=args.null_score_diff_threshold if args.version_2_with_negative else None,
        )

    return answer

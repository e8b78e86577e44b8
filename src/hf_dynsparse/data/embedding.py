"""Sentences without labels: the flags that name them, reading them, and tokenizing them; pairs with a similarity."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from .files import DataError, check_file
from .glue import glue_files, read_glue
from .pretraining import load_text


@dataclass
class EmbeddingTextArguments:
    """What it is trained on."""

    dataset_name: str | None = field(default=None, metadata={"help": "Dataset on the Hub, or a local dataset folder."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of that dataset."})
    train_file: str | None = field(
        default=None,
        metadata={
            "help": "A sentence or short paragraph a line, or in a column: .txt, .csv, .tsv, .json, .jsonl or "
            ".parquet, plain or .gz."
        },
    )
    validation_file: str | None = field(
        default=None, metadata={"help": "The same for evaluation. Default: the first rows of the training text."}
    )
    text_column_name: str | None = field(
        default=None, metadata={"help": "The column of sentences. Default: text, or the first one."}
    )
    validation_split_percentage: int = field(
        default=2, metadata={"help": "Share of the training text held out when there is no validation text."}
    )
    glue_dir: str | None = field(
        default=None,
        metadata={"help": "Folder with STS-B/dev.tsv: score the cosines of its pairs by Spearman's correlation."},
    )
    max_seq_length: int = field(default=128, metadata={"help": "Tokens per sentence; longer ones are cut."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only so many training sentences."})
    max_eval_samples: int | None = field(
        default=512, metadata={"help": "Compare only so many sentences with the teacher's in an evaluation."}
    )
    overwrite_cache: bool = field(default=False, metadata={"help": "Prepare the data again."})
    language: str | None = field(default=None, metadata={"help": "Language of the text, for the card, e.g. en."})
    streaming: ClassVar[bool] = False

    def check(self) -> None:
        """
        Refuse what cannot work before anything is read.

        Raises:
            ValueError: naming the flag.
        """
        if bool(self.dataset_name) == bool(self.train_file):
            raise ValueError(
                "Give the sentences: --train_file or --dataset_name. Got "
                f"{'both' if self.train_file else 'none'}. No labels are needed."
            )
        if not 1 <= self.validation_split_percentage <= 99:
            raise ValueError(
                f"`--validation_split_percentage` must lie in [1, 99]. Got {self.validation_split_percentage}."
            )
        if self.max_seq_length < 8:
            raise ValueError(f"`--max_seq_length` must be at least 8. Got {self.max_seq_length}.")
        for flag in ("train_file", "validation_file"):
            if getattr(self, flag) is not None:
                check_file(getattr(self, flag), f"--{flag}")
        if self.glue_dir is not None:
            glue_files(self.glue_dir, "stsb")


def load_plain_sentences(
    args: Any, tokenizer: PreTrainedTokenizerBase, *, cache_dir: str | None = None, token: str | None = None
) -> dict[str, Dataset]:
    """
    Token ids of the splits "train" and "validation". Rows without a word are passed over.

    Args:
        args ([`EmbeddingTextArguments`]).

    Raises:
        ValueError: if a split holds no text, or a file cannot be read, naming it.
    """
    limits = {"train": args.max_train_samples, "validation": args.max_eval_samples}
    options = {"batched": True, "load_from_cache_file": not args.overwrite_cache}
    sentences = {}
    for split, rows in load_text(args, cache_dir=cache_dir, token=token).items():
        rows = rows.filter(_hold_words, **options)
        if limits[split] is not None:
            rows = rows.select(range(min(limits[split], len(rows))))
        if not len(rows):
            raise DataError(f"The {split} text must hold a sentence. Got none. Give more, or a --validation_file.")
        sentences[split] = _tokenized(rows, "text", tokenizer, args)
    return sentences


def load_pairs(args: Any, tokenizer: PreTrainedTokenizerBase) -> tuple[Dataset, Dataset, list[float]] | None:
    """Token ids of both sentences of each pair of the STS-B development set, and how similar they are, from 0 to 5."""
    if args.glue_dir is None:
        return None
    rows = read_glue(args.glue_dir, "stsb")["validation"]
    first, second = (_tokenized(rows, name, tokenizer, args) for name in ("sentence1", "sentence2"))
    return first, second, list(rows["label"])


def _hold_words(batch: dict[str, list[str]]) -> list[bool]:
    return [bool(text.strip()) for text in batch["text"]]


def _tokenized(rows: Dataset, column: str, tokenizer: PreTrainedTokenizerBase, args: Any) -> Dataset:
    def tokenize(batch: dict[str, list[str]]) -> dict[str, Any]:
        return dict(tokenizer(batch[column], max_length=args.max_seq_length, truncation=True))

    use_cache = not args.overwrite_cache
    return rows.map(tokenize, batched=True, remove_columns=rows.column_names, load_from_cache_file=use_cache)

"""Text for masked language modelling: flags that name it, reading it, and making token sequences of it."""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset
from transformers import PreTrainedTokenizerBase

from .collators import DataCollatorForWholeWordMasking
from .corpus import embedded_corpus
from .files import DataError, check_file, read_file, reading
from .next_sentence import build_next_sentence_pairs, split_sentences
from .pieces import split_line
from .rows import check_text, looks_numeric


logger = logging.getLogger(__name__)


SHUFFLED = 10_000  # rows of a stream that are shuffled among each other
PACKED = 8000  # rows that are packed together: only the tail of each such batch is dropped


@dataclass
class TextArguments:
    """What it is trained on."""

    dataset_name: str | None = field(default=None, metadata={"help": "Dataset on the Hub, or a local dataset folder."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of that dataset."})
    train_file: str | None = field(
        default=None, metadata={"help": "Local .txt, .csv, .tsv, .json, .jsonl or .parquet file, plain or .gz."}
    )
    validation_file: str | None = field(default=None, metadata={"help": "The same for evaluation."})
    text_column_name: str | None = field(
        default=None, metadata={"help": "The column of text. Default: text, or the first one."}
    )
    validation_split_percentage: int = field(
        default=5, metadata={"help": "Share of the training text held out when there is no validation text."}
    )
    streaming: bool = field(
        default=False, metadata={"help": "Read while training, nothing on disk; needs --max_steps."}
    )
    max_seq_length: int = field(default=128, metadata={"help": "Tokens per sequence."})
    line_by_line: bool = field(default=False, metadata={"help": "One sequence a line instead of packed text."})
    pad_to_max_length: bool = field(default=False, metadata={"help": "Pad every sequence to --max_seq_length."})
    mlm_probability: float = field(
        default=0.15,
        metadata={"help": "Share of words to predict; in training --mlm_probability_schedule goes before it."},
    )
    whole_word_mask: bool = field(default=True, metadata={"help": "Mask whole words rather than single WordPieces."})
    nsp: bool = field(default=False, metadata={"help": "Next sentence prediction beside masked language modelling."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only so many training sequences."})
    max_eval_samples: int | None = field(
        default=None,
        metadata={
            "help": "Use only so many evaluation sequences. Default: all at the end; while pre-training so many of "
            "the first, at least 64, that all evaluations together take 6 %% of the sequences trained on."
        },
    )
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes that prepare the data."})
    overwrite_cache: bool = field(default=False, metadata={"help": "Prepare the data again."})
    language: str | None = field(default=None, metadata={"help": "Language of the text, for the card, e.g. en."})

    def check(self, max_steps: int) -> None:
        """
        Refuse what cannot work before anything is read.

        Args:
            max_steps (`int`): of the run; 0 or less if epochs decide.

        Raises:
            ValueError: naming the flag.
        """
        if not 1 <= self.validation_split_percentage <= 99:
            raise ValueError(
                f"`--validation_split_percentage` must lie in [1, 99]. Got {self.validation_split_percentage}."
            )
        if self.dataset_name and self.train_file:
            raise ValueError("Give --dataset_name or --train_file, not both.")
        if self.validation_file and not self.train_file:
            raise ValueError("--validation_file needs a --train_file beside it.")
        if self.nsp and (self.line_by_line or self.streaming):
            raise ValueError("--nsp builds pairs from whole documents: leave out --line_by_line and --streaming.")
        if self.streaming and max_steps <= 0:
            raise ValueError("--streaming has no known length: give --max_steps.")
        if not 8 <= self.max_seq_length <= 512:
            raise ValueError(f"`--max_seq_length` must lie in [8, 512]. Got {self.max_seq_length}.")
        if not 0.0 < self.mlm_probability < 1.0:
            raise ValueError(f"`--mlm_probability` must lie in (0, 1). Got {self.mlm_probability}.")
        for flag in ("train_file", "validation_file"):
            if getattr(self, flag) is not None:
                check_file(getattr(self, flag), f"--{flag}")

    def collator(self, tokenizer: PreTrainedTokenizerBase, seed: int) -> DataCollatorForWholeWordMasking:
        """What makes batches, and masks them."""
        return DataCollatorForWholeWordMasking(
            tokenizer,
            mlm_probability=self.mlm_probability,
            whole_word_mask=self.whole_word_mask,
            seed=seed,
            pad_to_multiple_of=self.max_seq_length if self.pad_to_max_length else None,
        )


def load_text(args: TextArguments, *, cache_dir: str | None = None, token: str | None = None) -> DatasetDict:
    """
    Splits "train" and "validation" with one column, "text": a line, or a whole document with line breaks.

    Raises:
        ValueError: if there is no text, or a file cannot be read, naming it.
    """
    source = args.dataset_name or args.train_file or "the built-in text"
    raw = _read(args, cache_dir, token)
    if "train" not in raw:
        raise DataError(f"`--dataset_name` must have a split train. Got {source} with only {', '.join(raw)}.")
    with reading(source):
        first = list(islice(raw["train"], 32))
    if not first:
        raise DataError(f"There must be text to train on. Got {source} without a row. Give another.")
    column = args.text_column_name or ("text" if "text" in first[0] else next(iter(first[0])))
    if column not in first[0]:
        raise DataError(
            f"`--text_column_name` must name a column. Got {column!r} for {source} with {', '.join(first[0])}."
        )
    if column != "text" and all(looks_numeric(row[column]) for row in first):
        raise DataError(
            f"The text must be words. Got {first[0][column]!r} in column `{column}` of {source}, the first of "
            f"{', '.join(first[0])}. Name the column of text by `--text_column_name`."
        )
    for split in ("train", "validation"):
        if split in raw:
            name = args.dataset_name or getattr(args, f"{split}_file") or source
            raw[split] = _text_alone(raw[split], column, name)
    if "validation" not in raw:
        raw = _hold_out(raw["train"], args, source)
    return DatasetDict({split: raw[split] for split in ("train", "validation")})


def _read(args: TextArguments, cache_dir: str | None, token: str | None) -> dict[str, Any]:
    """The splits of a data set, the files, or the built-in text."""
    options: dict[str, Any] = {"cache_dir": cache_dir, "streaming": args.streaming}
    if args.dataset_name:
        with reading(args.dataset_name):
            return dict(load_dataset(args.dataset_name, args.dataset_config_name, token=token, **options))
    files = {"train": args.train_file, "validation": args.validation_file}
    if args.train_file is None:
        logger.info("without --train_file the text is what the Python packages on this machine say of themselves")
        corpus = embedded_corpus(cache_dir)
        files = {"train": str(corpus.train_file), "validation": str(corpus.validation_file)}
    return {split: read_file(file, split, **options) for split, file in files.items() if file}


def _text_alone(rows: Dataset, column: str, source: str) -> Dataset:
    """Rows with one column, "text", which is known to hold strings."""
    names: dict[str, Any] = next(iter(rows), {})
    if column not in names:
        raise DataError(f"All splits must have the column `{column}`. Got {source} with {', '.join(names) or 'none'}.")
    rows = check_text(rows.select_columns([column]), column, source)
    return rows if column == "text" else rows.rename_column(column, "text")


def _hold_out(rows: Dataset, args: TextArguments, source: str) -> dict[str, Dataset]:
    """The first rows for validation, the others for training; of a stream, whose length is not known, a number."""
    percent = args.validation_split_percentage
    if not args.streaming:
        cut = len(rows) * percent // 100
        return {"validation": rows.select(range(cut)), "train": rows.select(range(cut, len(rows)))}
    count = percent * 100
    rest = rows.skip(count)
    if next(iter(rest), None) is None:
        raise DataError(
            f"--streaming holds out the first {count} rows: 100 times --validation_split_percentage. Got {source}, "
            "which has no more. Give a --validation_file, or leave out --streaming."
        )
    return {"validation": rows.take(count), "train": rest}


def make_sequences(
    raw: DatasetDict, tokenizer: PreTrainedTokenizerBase, args: TextArguments, seed: int = 0
) -> dict[str, Dataset]:
    """
    Token sequences of at most `args.max_seq_length`: packed text, single lines, or sentence pairs.

    Args:
        raw (`DatasetDict`): of [`load_text`].
        seed (`int`): of sentence pairs, and of the order of a stream.

    Raises:
        ValueError: if a split does not fill one sequence.
    """
    limits = {"train": args.max_train_samples, "validation": args.max_eval_samples}
    sequences = {}
    for split in ("train", "validation"):
        packed = _pairs(raw[split], tokenizer, args, seed) if args.nsp else _packed(raw[split], tokenizer, args, split)
        limit = limits[split]
        if limit is not None:
            packed = packed.take(limit) if args.streaming else packed.select(range(min(limit, len(packed))))
        if next(iter(packed), None) is None:
            raise DataError(
                f"The {split} text must fill at least one sequence of {args.max_seq_length} tokens. Got none. "
                "Give more text, a smaller --max_seq_length or --line_by_line."
            )
        sequences[split] = packed
    if args.streaming:
        sequences["train"] = sequences["train"].shuffle(seed=seed, buffer_size=SHUFFLED)
    return sequences


def _packed(rows: Dataset, tokenizer: PreTrainedTokenizerBase, args: TextArguments, split: str) -> Dataset:
    """Sequences with a special token at both ends, `max_seq_length` long, or a line each."""
    begin, end, room = tokenizer.cls_token_id, tokenizer.sep_token_id, args.max_seq_length - 2

    def tokenize(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        taken = 1 if args.line_by_line else None  # of a line
        lines = (line for text in batch["text"] for line in text.splitlines())
        pieces = [piece for line in lines for piece in islice(split_line(line), taken)]
        return {"input_ids": tokenizer(pieces, add_special_tokens=False, verbose=False)["input_ids"] if pieces else []}

    def pack(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        if args.line_by_line:
            chunks = [ids[:room] for ids in batch["input_ids"] if ids]
        else:
            flat = [token for ids in batch["input_ids"] for token in ids]
            chunks = [flat[start : start + room] for start in range(0, len(flat) - room + 1, room)]
        return {"input_ids": [[begin, *chunk, end] for chunk in chunks]}

    def options(desc: str) -> dict[str, Any]:
        if args.streaming:  # streams have neither processes, nor a cache, nor a progress bar
            return {}
        processes, use_cache = args.preprocessing_num_workers, not args.overwrite_cache
        return {"num_proc": processes, "load_from_cache_file": use_cache, "desc": f"{desc} {split}"}

    tokens = rows.map(tokenize, batched=True, remove_columns=["text"], **options("tokenize"))
    return tokens.map(pack, batched=True, batch_size=PACKED, **options("pack"))


def _pairs(rows: Dataset, tokenizer: PreTrainedTokenizerBase, args: TextArguments, seed: int) -> Dataset:
    """Two segments each, of one document or of two, for next sentence prediction."""
    documents = _documents(rows, tokenizer)
    length = args.max_seq_length
    return Dataset.from_list(list(build_next_sentence_pairs(documents, tokenizer, max_seq_length=length, seed=seed)))


def _documents(rows: Iterable[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[list[int]]]:
    """Documents as lists of tokenized sentences: a row with line breaks is one; an empty row or a title ends one."""
    sentences: list[str] = []

    def tokenized() -> list[list[int]]:
        return tokenizer(sentences, add_special_tokens=False, verbose=False)["input_ids"]

    for row in rows:
        lines = [line for line in row["text"].splitlines() if line.strip()]
        title = len(lines) == 1 and lines[0].startswith("= ") and lines[0].rstrip().endswith(" =")
        if (title or len(lines) != 1) and sentences:
            yield tokenized()
            sentences = []
        if not title:
            long = (sentence for line in lines for sentence in split_sentences(line))
            sentences.extend(piece for sentence in long for piece in split_line(sentence))
    if sentences:
        yield tokenized()

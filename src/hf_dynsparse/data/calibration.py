"""A few texts as batches of token ids, to be passed through a model that is pruned by them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from .files import DataError, check_file, read_file


def read_calibration(
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    samples: int = 512,
    max_seq_length: int = 128,
    batch_size: int = 32,
) -> list[dict[str, torch.Tensor]]:
    """
    Batches of texts of a file, as arguments of a model.

    Args:
        path (`str`): a text file, a sentence or paragraph a line, or rows with a column `text`; plain or .gz.
        tokenizer ([`PreTrainedTokenizerBase`]): of the model.
        samples (`int`, *optional*, defaults to 512): texts to take, evenly from the whole file.
        max_seq_length (`int`, *optional*, defaults to 128): tokens at which a text is cut.
        batch_size (`int`, *optional*, defaults to 32): texts of a batch, of similar length.

    Returns:
        `list[dict[str, torch.Tensor]]`: what the tokenizer gives, `attention_mask` among it, each of shape
        `(batch_size, tokens)`, longest first.

    Raises:
        ValueError: for a file that cannot be read or holds no text.
    """
    texts = read_texts(path)
    texts = [texts[number] for number in spread(len(texts), samples)]
    return batches_of(texts, tokenizer, max_seq_length, batch_size)


def spread(count: int, samples: int) -> list[int]:
    """At most `samples` of `count` places, evenly from all of them."""
    return [number * count // samples for number in range(samples)] if samples < count else list(range(count))


def read_texts(path: str) -> list[str]:
    """
    The texts of a file, in order: lines, or the column `text`, or else the first one. Empty ones are passed over.

    Raises:
        ValueError: for a file that cannot be read or holds no text.
    """
    check_file(path, "--calibration")
    rows = list(read_file(path, streaming=True))
    column = "text" if "text" in rows[0] else next(iter(rows[0]))
    texts = [row[column] for row in rows if isinstance(row[column], str) and row[column].strip()]
    if not texts:
        raise DataError(f"`--calibration` must hold text. Got {path}, without a word in its column `{column}`.")
    return texts


def batches_of(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, max_seq_length: int = 128, batch_size: int = 32
) -> list[dict[str, torch.Tensor]]:
    """`texts` as batches, longest first; see [`read_calibration`]. A tokenizer without a padding token pads by 0."""
    encoded = tokenizer(texts, truncation=True, max_length=max_seq_length, return_attention_mask=True)
    return _batches(encoded, tokenizer, batch_size)


def batches_of_rows(
    rows: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase, samples: int = 512, batch_size: int = 32
) -> list[dict[str, torch.Tensor]]:
    """
    Some rows that a model is trained on as batches of what a tokenizer gives, without labels; see
    [`read_calibration`]. Of a stream they are the first.
    """
    streamed = isinstance(rows, IterableDataset)
    chosen = list(rows.take(samples) if streamed else rows.select(spread(len(rows), samples)))
    names = [name for name in tokenizer.model_input_names if name in chosen[0]]
    encoded = {name: [row[name] for row in chosen] for name in names}
    encoded.setdefault("attention_mask", [[1] * len(ids) for ids in encoded["input_ids"]])
    return _batches(encoded, tokenizer, batch_size)


def _batches(
    encoded: Mapping[str, Sequence[Any]], tokenizer: PreTrainedTokenizerBase, batch_size: int
) -> list[dict[str, torch.Tensor]]:
    order = sorted(range(len(encoded["input_ids"])), key=lambda row: -len(encoded["input_ids"][row]))
    padding = {"input_ids": tokenizer.pad_token_id or 0}
    return [
        {
            key: _padded([rows[row] for row in order[start : start + batch_size]], padding.get(key, 0))
            for key, rows in encoded.items()
        }
        for start in range(0, len(order), batch_size)
    ]


def _padded(rows: list[Any], value: int) -> torch.Tensor:
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)

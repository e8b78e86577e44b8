"""How often each piece of a vocabulary occurs in token sequences: what a model that sees no context can know."""

from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase


COUNTED = 10_000  # rows of a stream, whose end is not known
BATCH = 1000  # rows at a time


def count_pieces(sequences: Any, tokenizer: PreTrainedTokenizerBase, size: int) -> np.ndarray:
    """
    Occurrences of each piece in the column `input_ids`. Special tokens are never masked and do not count. Of a stream
    the first 10,000 rows stand for all.

    Args:
        sequences (`datasets.Dataset` or `datasets.IterableDataset`): see [`make_sequences`].
        tokenizer (`PreTrainedTokenizerBase`): whose ids these are.
        size (`int`): of the model's vocabulary, larger than any id.

    Returns:
        `np.ndarray` of shape `(size,)` and type int64.
    """
    rows = sequences if isinstance(sequences, Dataset) else sequences.take(COUNTED)
    counts = np.zeros(size, dtype=np.int64)
    for table in rows.with_format("arrow").iter(BATCH):  # buffers of columns, no Python object a token
        for chunk in table["input_ids"].chunks:
            counts += np.bincount(chunk.flatten().to_numpy(), minlength=size)
    counts[tokenizer.all_special_ids] = 0
    return counts

import numpy as np
import pytest
from datasets import Dataset

from hf_dynsparse.data import count_pieces, frequencies
from tests.toy import toy_examples, toy_tokenizer


@pytest.mark.parametrize("batch", [1000, 7])
def test_counts_of_a_table_and_of_a_stream(monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    monkeypatch.setattr(frequencies, "BATCH", batch)
    rows = [*toy_examples(20, length=9), *toy_examples(10, seed=1)]
    kept = [row["input_ids"] for row in rows[3:]]
    expected = np.bincount(np.concatenate(kept), minlength=70)
    expected[:5] = 0  # special
    table = Dataset.from_list(rows)
    assert (count_pieces(table.select(range(3, 30)), toy_tokenizer(), 70) == expected).all()
    stream = table.to_iterable_dataset(num_shards=2).skip(3)
    assert (count_pieces(stream, toy_tokenizer(), 70) == expected).all()
    packed = stream.map(lambda texts: {"input_ids": texts["input_ids"]}, batched=True).shuffle(0, buffer_size=4)
    assert (count_pieces(packed, toy_tokenizer(), 70) == expected).all()
    monkeypatch.setattr(frequencies, "COUNTED", 5)
    assert count_pieces(stream, toy_tokenizer(), 70).sum() == 5 * 7

"""A trained tokenizer is BERT's, and the same each time."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer, BertTokenizer

from hf_dynsparse.data import train_wordpiece_tokenizer


TEXTS = ["The block is pruned and a new block regrows.", "Blocks are pruned; blocks regrow, and the café is open."] * 9


def test_training_is_deterministic_and_survives_saving(tmp_path: Path) -> None:
    first = train_wordpiece_tokenizer(iter(TEXTS), vocab_size=60)
    second = train_wordpiece_tokenizer(iter(TEXTS), vocab_size=60)
    assert first.get_vocab() == second.get_vocab()
    assert len(first) == 60
    first.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(loaded, BertTokenizer)
    assert loaded.get_vocab() == first.get_vocab()
    assert loaded.model_max_length == first.model_max_length == 512
    encoded = loaded("The CAFÉ", "blocks")
    assert encoded == first("the cafe", "blocks")
    assert encoded["input_ids"][0] == loaded.cls_token_id
    assert encoded["token_type_ids"][0] == 0
    assert encoded["token_type_ids"][-1] == 1


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"`vocab_size` must be larger than the 5 .* Got 5\."):
        train_wordpiece_tokenizer(TEXTS, vocab_size=5)
    with pytest.raises(ValueError, match="at least one word"):
        train_wordpiece_tokenizer([])

"""A trained tokenizer is BERT's, and the same each time."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer, BertTokenizer

from hf_dynsparse.data import split_line, train_wordpiece_tokenizer


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


def test_words_over_100_letters_and_long_lines() -> None:
    usual = train_wordpiece_tokenizer(TEXTS, vocab_size=60).get_vocab()
    # Not even their letters: 100,000 of them would take a minute, and no tokenizer reads such a word.
    strange = ["Q" * 100_000, "é" * 101, "the" + "q" * 101]
    assert train_wordpiece_tokenizer([*TEXTS, *strange, *strange], vocab_size=60).get_vocab() == usual
    assert train_wordpiece_tokenizer([" ".join([*TEXTS, *strange])], vocab_size=60).get_vocab() == usual
    # Short words without a space between are no long one.
    assert "qqqq" in train_wordpiece_tokenizer(["qqqq," * 100], vocab_size=60).get_vocab()


@pytest.mark.parametrize(
    ("line", "pieces"),
    [
        ("", []),
        ("  ", []),
        ("ab cd", ["ab cd"]),
        ("abc defgh", ["abc", "defgh"]),
        ("abcdef gh", ["abcde", "f gh"]),
        ("abcde fghij", ["abcde", "fghij"]),
        ("a b c d e f", ["a b c", "d e f"]),
        ("abcdefghijk", ["abcde", "fghij", "k"]),
    ],
)
def test_pieces(line: str, pieces: list[str]) -> None:
    assert list(split_line(line, 5)) == pieces

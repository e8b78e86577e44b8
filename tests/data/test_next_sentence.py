"""Next-sentence pairs: what holds for each pair, and how often."""

import pytest
from transformers import BertTokenizer

from hf_dynsparse.data import build_next_sentence_pairs


Pair = dict[str, list[int] | int]


@pytest.fixture(scope="module")
def tokenizer() -> BertTokenizer:
    return BertTokenizer()


def make_documents(count: int = 40, segments: int = 30) -> list[list[list[int]]]:
    """Token ids that count up, so that each token tells its document, and neighbours are next to each other."""
    documents = []
    for number in range(count):
        token, document = 10_000 * (number + 1), []
        for segment in range(segments):
            length = 3 + (7 * segment + number) % 12
            document.append(list(range(token, token + length)))
            token += length
        documents.append(document)
    return documents


def halves(pair: Pair) -> tuple[list[int], list[int]]:
    ids = pair["input_ids"]
    assert isinstance(ids, list)
    separators = [i for i, token in enumerate(ids) if token < 10]
    assert (separators[0], separators[2], len(separators)) == (0, len(ids) - 1, 3)
    return ids[1 : separators[1]], ids[separators[1] + 1 : -1]


def test_worked_example(tokenizer: BertTokenizer) -> None:
    # One segment each: there is nothing to follow, so B is the other document.
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    pairs = list(build_next_sentence_pairs([[[11, 12]], [], [[], [21]]], tokenizer, 8))
    assert pairs == [
        {
            "input_ids": [cls, 11, 12, sep, 21, sep],
            "token_type_ids": [0, 0, 0, 0, 1, 1],
            "attention_mask": [1] * 6,
            "special_tokens_mask": [1, 0, 0, 1, 0, 1],
            "next_sentence_label": 1,
        },
        {
            "input_ids": [cls, 21, sep, 11, 12, sep],
            "token_type_ids": [0, 0, 0, 1, 1, 1],
            "attention_mask": [1] * 6,
            "special_tokens_mask": [1, 0, 1, 0, 0, 1],
            "next_sentence_label": 1,
        },
    ]


@pytest.mark.parametrize("max_seq_length", [5, 32, 128])
def test_invariants(tokenizer: BertTokenizer, max_seq_length: int) -> None:
    for pair in build_next_sentence_pairs(make_documents(), tokenizer, max_seq_length):
        first, second = halves(pair)
        assert 5 <= len(pair["input_ids"]) <= max_seq_length
        assert {len(value) for value in pair.values() if isinstance(value, list)} == {len(pair["input_ids"])}
        assert pair["token_type_ids"] == [0] * (len(first) + 2) + [1] * (len(second) + 1)
        assert pair["special_tokens_mask"] == [int(token < 10) for token in pair["input_ids"]]
        for half in (first, second):
            assert half == list(range(half[0], half[0] + len(half)))
        same_document = first[0] // 10_000 == second[0] // 10_000
        assert same_document == (pair["next_sentence_label"] == 0)
        if same_document:
            assert first[-1] < second[0]


def test_statistics(tokenizer: BertTokenizer) -> None:
    pairs = list(build_next_sentence_pairs(make_documents(400), tokenizer, 64, short_seq_probability=0.1))
    labels = [pair["next_sentence_label"] for pair in pairs]
    lengths = [len(pair["input_ids"]) for pair in pairs]
    assert sum(labels) / len(labels) == pytest.approx(0.5, abs=0.1)
    assert sum(length == 64 for length in lengths) / len(lengths) == pytest.approx(0.9, abs=0.15)
    short = list(build_next_sentence_pairs(make_documents(400), tokenizer, 64, short_seq_probability=1.0))
    assert sum(len(pair["input_ids"]) for pair in short) / len(short) < 0.8 * sum(lengths) / len(lengths)


def test_nothing_is_lost_where_nothing_is_truncated(tokenizer: BertTokenizer) -> None:
    documents = make_documents(10, 6)
    pairs = list(build_next_sentence_pairs(documents, tokenizer, 512, short_seq_probability=0.0))
    seen = {token for pair in pairs for half in halves(pair) for token in half}
    assert seen == {token for document in documents for segment in document for token in segment}


def test_pairs_are_deterministic(tokenizer: BertTokenizer) -> None:
    documents = make_documents()
    first = list(build_next_sentence_pairs(iter(documents), tokenizer, seed=1))
    assert list(build_next_sentence_pairs(documents, tokenizer, seed=1)) == first
    assert list(build_next_sentence_pairs(documents, tokenizer, seed=2)) != first
    assert documents == make_documents()


def test_errors(tokenizer: BertTokenizer) -> None:
    with pytest.raises(ValueError, match=r"at least two documents .* Got 1\."):
        list(build_next_sentence_pairs([[[1]], [[]]], tokenizer))
    with pytest.raises(ValueError, match=r"at least 5: .* Got 4\."):
        list(build_next_sentence_pairs(make_documents(2), tokenizer, 4))

"""Which tokenizers are refused, and which models for them."""

from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, PreTrainedTokenizerFast, RobertaConfig

from hf_dynsparse.data.files import DataError
from hf_dynsparse.data.tokenizer_checks import (
    check_fit,
    check_positions,
    check_special_tokens,
    check_tokenizer,
    vocabulary_size,
)


VOCABULARY = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4, "a": 5, "b": 6}
SPECIAL = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}


def tokenizer(*, without: str = "", processed: bool = True, vocabulary: Any = VOCABULARY) -> PreTrainedTokenizerFast:
    backend = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    if processed:
        backend.post_processor = TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
        )
    special = {name: token for name, token in SPECIAL.items() if name != f"{without}_token"}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, model_input_names=["input_ids", "token_type_ids", "attention_mask"], **special
    )


@pytest.mark.parametrize("without", ["cls", "sep", "mask", "pad"])
def test_a_token_is_missing(without: str) -> None:
    needed = ("cls", "sep", "mask", "pad")
    check_tokenizer(tokenizer(), needed)
    lacks = tokenizer(without=without)
    with pytest.raises(DataError, match=f"Got .* without {without}_token. Set it"):
        check_tokenizer(lacks, needed)
    check_tokenizer(lacks, [name for name in needed if name != without])


def test_special_tokens_that_are_not_added() -> None:
    check_special_tokens(tokenizer())
    check_special_tokens(tokenizer(processed=False, without="cls"))  # has none to add
    with pytest.raises(DataError, match=r"leaves out \[CLS\]: it has no post-processor"):
        check_special_tokens(tokenizer(processed=False))


def test_ids_beyond_the_vocabulary() -> None:
    gaps = tokenizer(vocabulary=VOCABULARY | {"c": 40})
    assert (len(gaps), vocabulary_size(gaps)) == (8, 41)
    check_fit(gaps, BertConfig(vocab_size=41), 8)
    with pytest.raises(DataError, match="Got 40 as the highest of .* The teacher has 40 entries"):
        check_fit(gaps, BertConfig(vocab_size=40), 8, "The teacher")


def test_types_of_tokens() -> None:
    config = BertConfig(type_vocab_size=1)
    check_fit(tokenizer(), config, 8)
    check_fit(tokenizer(), BertConfig(), 8, pairs=True)
    with pytest.raises(DataError, match="Got 1 for the second of two texts. The model has `type_vocab_size` 1"):
        check_fit(tokenizer(), config, 8, pairs=True)


def test_positions() -> None:
    check_positions(BertConfig(max_position_embeddings=64), 64)
    with pytest.raises(DataError, match="`--max_seq_length` .* Got 65. The model has 64: give --max_seq_length 64"):
        check_positions(BertConfig(max_position_embeddings=64), 65)
    roberta = RobertaConfig(max_position_embeddings=66, pad_token_id=1)  # counts from the one after padding
    check_positions(roberta, 64)
    with pytest.raises(DataError, match="Got 65. The model has 64"):
        check_positions(roberta, 65)

"""Whole-word masking: a worked example, its statistics, and what it may depend on."""

import pickle
import random

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE, WordLevel
from transformers import BertTokenizer, PreTrainedTokenizerFast

from hf_dynsparse.data import DataCollatorForWholeWordMasking


SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [f"w{i}" for i in range(200)] + [f"##p{i}" for i in range(100)]
PAD, UNK, CLS, SEP, MASK = range(5)


@pytest.fixture(scope="module")
def tokenizer() -> BertTokenizer:
    return BertTokenizer(vocab={token: i for i, token in enumerate(SPECIAL + WORDS)}, model_max_length=512)


def example(generator: random.Random, length: int) -> dict[str, list[int]]:
    return {"input_ids": [CLS, *(generator.randrange(5, 305) for _ in range(length - 2)), SEP]}


def examples(count: int, length: int = 64, seed: int = 0) -> list[dict[str, list[int]]]:
    generator = random.Random(seed)
    return [example(generator, length) for _ in range(count)]


def test_worked_example(tokenizer: BertTokenizer) -> None:
    # Every word is selected, so that the labels can be written down; padded on the right to a multiple of 4.
    collator = DataCollatorForWholeWordMasking(tokenizer, mlm_probability=1.0, pad_to_multiple_of=4)
    batch = collator(
        [
            {"input_ids": [CLS, 7, 205, SEP], "token_type_ids": [0, 0, 0, 0], "next_sentence_label": 1},
            {
                "input_ids": [CLS, 9, SEP, UNK, 206, SEP],
                "token_type_ids": [0, 0, 0, 1, 1, 1],
                "next_sentence_label": 0,
            },
        ]
    )
    assert set(batch) == {"input_ids", "attention_mask", "token_type_ids", "labels", "next_sentence_label"}
    assert batch["labels"].tolist() == [
        [-100, 7, 205, -100, -100, -100, -100, -100],
        [-100, 9, -100, -100, 206, -100, -100, -100],
    ]
    assert batch["attention_mask"].tolist() == [[1] * 4 + [0] * 4, [1] * 6 + [0] * 2]
    assert batch["token_type_ids"].tolist() == [[0] * 8, [0, 0, 0, 1, 1, 1, 0, 0]]
    assert batch["next_sentence_label"].tolist() == [1, 0]
    kept = batch["labels"] == -100
    assert batch["input_ids"][kept].tolist() == [CLS, SEP, PAD, PAD, PAD, PAD, CLS, SEP, UNK, SEP, PAD, PAD]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


@pytest.mark.parametrize(
    ("pieces", "words"),
    [
        (["w1", "##a", "##b", "w2", "##c", "w3"], [[0, 1, 2], [3, 4], [5]]),
        (["\u2581w1", "a", "b", "\u2581w2", "c", "\u2581##"], [[0, 1, 2], [3, 4], [5]]),  # SentencePiece
        (["a", "b", "\u0120w1", "c", "\u0120w2", "##"], [[0, 1], [2, 3], [4, 5]]),  # byte-level BPE, no space in front
    ],
)
def test_pieces_of_a_word_are_selected_together(pieces: list[str], words: list[list[int]]) -> None:
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *pieces])}
    tokenizer = BertTokenizer(vocab=vocabulary)
    collator = DataCollatorForWholeWordMasking(tokenizer, mlm_probability=0.3)
    row = {"input_ids": [CLS, *range(5, 5 + len(pieces)), SEP]}
    found = set()
    for epoch in range(60):
        collator.set_epoch(epoch)
        selected = np.flatnonzero(collator([row])["labels"][0, 1:-1] != -100).tolist()
        whole = [word for word in words if word[0] in selected]
        assert selected == [place for word in whole for place in word]
        found.update(tuple(word) for word in whole)
    assert found == {tuple(word) for word in words}


def test_tokens_without_a_mark_are_words_and_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, "a</w>", "b"])}
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    for model, warns in ((BPE(vocabulary, []), True), (WordLevel(vocabulary, "[UNK]"), False)):
        caplog.clear()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), **special)
        assert not DataCollatorForWholeWordMasking(tokenizer).continues_word.any()
        assert ("No token tells where a word begins" in caplog.text) == warns
        assert DataCollatorForWholeWordMasking(tokenizer, whole_word_mask=False)
        assert caplog.text.count("No token") == warns


def test_ids_with_gaps() -> None:
    vocabulary = {token: i for i, token in enumerate(SPECIAL)} | {"a": 7, "b": 20, "##c": 40}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(vocabulary, "[UNK]")),
        **{f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")},
    )
    collator = DataCollatorForWholeWordMasking(tokenizer, mlm_probability=1.0)
    batch = collator([{"input_ids": [CLS, 7, 20, 40] * 200}])
    assert set(batch["input_ids"].unique().tolist()) == {CLS, MASK, 7, 20, 40}  # no id that stands for nothing


@pytest.mark.parametrize("whole_word_mask", [True, False])
def test_statistics(tokenizer: BertTokenizer, whole_word_mask: bool) -> None:
    rows = examples(1000, 128)
    batch = DataCollatorForWholeWordMasking(tokenizer, whole_word_mask=whole_word_mask)(rows)
    original = torch.tensor([row["input_ids"] for row in rows])
    selected = batch["labels"] != -100
    assert torch.equal(batch["labels"][selected], original[selected])
    assert torch.equal(batch["input_ids"][~selected], original[~selected])
    assert selected.sum() / (1000 * 126) == pytest.approx(0.15, abs=0.005)
    after, before = batch["input_ids"][selected], original[selected]
    share = 1 / len(after)
    assert (after == MASK).sum() * share == pytest.approx(0.8, abs=0.01)
    assert (after == before).sum() * share == pytest.approx(0.1, abs=0.01)
    replaced = after[(after != MASK) & (after != before)]
    assert len(replaced) * share == pytest.approx(0.1, abs=0.01)
    assert replaced.min() >= len(SPECIAL)
    assert len(replaced.unique()) > 290  # of 300
    # Positions are alike, and so are pairs of neighbours: a selected word says nothing about the next one.
    assert selected[:, 1:-1].float().mean(0).numpy() == pytest.approx(0.15, abs=0.06)
    if not whole_word_mask:
        assert (selected[:, 1:-2] & selected[:, 2:-1]).float().mean() == pytest.approx(0.15**2, abs=0.002)


def test_no_word_is_split(tokenizer: BertTokenizer) -> None:
    rows = examples(500)
    selected = DataCollatorForWholeWordMasking(tokenizer)(rows)["labels"] != -100
    ids = torch.tensor([row["input_ids"] for row in rows])
    continues = (ids[:, 1:] >= 205) & (ids[:, :-1] != CLS)
    assert continues.sum() > 5000
    assert torch.equal(selected[:, 1:][continues], selected[:, :-1][continues])


def test_draw_depends_on_the_example_alone(tokenizer: BertTokenizer) -> None:
    generator = random.Random(1)
    rows = [example(generator, generator.randrange(3, 60)) for _ in range(32)]
    collator = DataCollatorForWholeWordMasking(tokenizer, seed=3)
    torch.manual_seed(0)
    together = collator(rows)
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    copy = pickle.loads(pickle.dumps(collator))
    for index, row in enumerate(rows):
        alone = copy([row])
        length = len(row["input_ids"])
        for name in ("input_ids", "labels"):
            assert torch.equal(alone[name][0], together[name][index, :length])
    halves = [collator(rows[start::2]) for start in (0, 1)]
    for start, half in enumerate(halves):
        width = half["labels"].shape[1]
        assert torch.equal(half["labels"], together["labels"][start::2, :width])
    padded = [{"input_ids": row["input_ids"] + [PAD] * (64 - len(row["input_ids"]))} for row in rows]
    assert torch.equal(collator(padded)["labels"][:, : together["labels"].shape[1]], together["labels"])


def test_draw_uses_no_global_generator(tokenizer: BertTokenizer) -> None:
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    DataCollatorForWholeWordMasking(tokenizer)(examples(8))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]


def test_seed_and_epoch_change_the_draw(tokenizer: BertTokenizer) -> None:
    rows = examples(64)
    collator = DataCollatorForWholeWordMasking(tokenizer)
    first = collator(rows)["labels"]
    collator.set_epoch(1)
    second = collator(rows)["labels"]
    other = DataCollatorForWholeWordMasking(tokenizer, seed=1)(rows)["labels"]
    for one, two in ((first, second), (first, other), (second, other)):
        # Unrelated draws agree on a selected token about as often as chance has it.
        assert ((one != -100) & (two != -100)).float().mean() == pytest.approx(0.15**2, abs=0.01)
    collator.set_epoch(0)
    assert torch.equal(collator(rows)["labels"], first)


def test_masks_are_pinned(tokenizer: BertTokenizer) -> None:
    # A change here changes every run that is resumed from an older version.
    batch = DataCollatorForWholeWordMasking(tokenizer, seed=42)([{"input_ids": [CLS, *range(5, 25), SEP]}])
    assert (batch["labels"][0] != -100).nonzero().flatten().tolist() == [1, 15, 17, 18, 19]


def test_each_example_has_a_selected_word_if_it_has_a_word(tokenizer: BertTokenizer) -> None:
    collator = DataCollatorForWholeWordMasking(tokenizer, mlm_probability=1e-9)
    batch = collator([*examples(50, 12), {"input_ids": [CLS, 6, 206, 207, SEP]}, {"input_ids": [CLS, UNK, SEP]}])
    selected = batch["labels"] != -100
    words = (selected & (batch["labels"] < 205)).sum(1) + (selected[:, 1] & (batch["labels"][:, 1] >= 205))
    assert words[:50].tolist() == [1] * 50
    assert selected[50].tolist() == [False, True, True, True] + [False] * 8
    assert not selected[51].any()


def test_special_tokens_mask_and_attention_mask_are_respected(tokenizer: BertTokenizer) -> None:
    row = {
        "input_ids": [CLS, 5, 6, 7, SEP],
        "special_tokens_mask": [1, 0, 1, 0, 1],
        "attention_mask": [1, 1, 1, 0, 1],
    }
    batch = DataCollatorForWholeWordMasking(tokenizer, mlm_probability=1.0)([row])
    assert "special_tokens_mask" not in batch
    assert batch["labels"].tolist() == [[-100, 5, -100, -100, -100]]
    assert batch["attention_mask"].tolist() == [row["attention_mask"]]


def test_arrays_and_tensors_are_accepted(tokenizer: BertTokenizer) -> None:
    rows = examples(4)
    collator = DataCollatorForWholeWordMasking(tokenizer)
    expected = collator(rows)
    for convert in (np.array, torch.tensor):
        batch = collator([{"input_ids": convert(row["input_ids"]), "score": convert(0.5)} for row in rows])
        assert torch.equal(batch["labels"], expected["labels"])
        assert batch["score"].tolist() == [0.5] * 4
        assert batch["score"].dtype == torch.float32


def test_errors(tokenizer: BertTokenizer) -> None:
    collator = DataCollatorForWholeWordMasking(tokenizer)
    with pytest.raises(ValueError, match="at least one example"):
        collator([])
    with pytest.raises(ValueError, match="Remove that column"):
        collator([{"input_ids": [CLS, 5, SEP], "labels": [CLS, 5, SEP]}])
    with pytest.raises(ValueError, match="Got `text` with 'abc'"):
        collator([{"input_ids": [CLS, 5, SEP], "text": "abc"}])
    with pytest.raises(ValueError, match="Got `word_ids` with"):
        collator([{"input_ids": [CLS, 5, SEP], "word_ids": [0, 1, 2]}])
    with pytest.raises(ValueError, match=r"`token_type_ids` must be as long as `input_ids` \(3\)"):
        collator([{"input_ids": [CLS, 5, SEP], "token_type_ids": [0]}])
    with pytest.raises(ValueError, match=r"`mlm_probability` must be in \(0, 1\]"):
        DataCollatorForWholeWordMasking(tokenizer, mlm_probability=0.0)
    with pytest.raises(ValueError, match="must be positive"):
        DataCollatorForWholeWordMasking(tokenizer, pad_to_multiple_of=0)
    with pytest.raises(ValueError, match="not special"):
        DataCollatorForWholeWordMasking(BertTokenizer())

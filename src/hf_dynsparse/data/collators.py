"""Whole-word masking that depends on nothing but the seed, the epoch and the example itself."""

import copy
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from .tokenizer_checks import check_tokenizer, vocabulary_size


logger = logging.getLogger(__name__)

# How pieces tell where words begin: WordPiece marks those that go on, SentencePiece and byte-level BPE the first ones.
CONTINUES, BEGINS = ("##",), ("\u2581", "\u0120")
GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiples of it are distinct modulo 2^64
IGNORED = -100
DRAWS = "mask_draws"  # the column of each token's draw, if a collator hands it over
# Features as long as `input_ids`, with what they are padded with.
PADDING = {"token_type_ids": 0, "attention_mask": 0, "special_tokens_mask": 1}


class DataCollatorForWholeWordMasking:
    """
    Pads examples and masks whole words for masked language modelling.

    Each word is selected with probability `mlm_probability`; each token of a selected word is replaced by `[MASK]`
    (80 %), by a random token that is not special (10 %) or left as it is (10 %). An example in which no word was
    drawn gets one. All of it is a pure function of (`seed`, epoch, the example's own tokens): batch size, ranks,
    workers and prefetching do not change it, and no generator has to be saved to resume.

    Args:
        tokenizer ([`PreTrainedTokenizerBase`]):
            Has a mask and a padding token, and pieces that tell where words begin: WordPiece (`##` goes on),
            SentencePiece (U+2581 begins) or byte-level BPE (U+0120 begins). Of another one each token is a word, and
            the log says so.
        mlm_probability (`float`, *optional*, defaults to 0.15):
            Expected share of words that are selected.
        whole_word_mask (`bool`, *optional*, defaults to `True`):
            Whether the pieces of a word are selected together. If not, each token is a word.
        seed (`int`, *optional*, defaults to 0):
            Seed of the draw.
        pad_to_multiple_of (`int`, *optional*):
            Round the padded length up to a multiple of this.

    Raises:
        ValueError: If the tokenizer lacks a token that is needed, or `mlm_probability` is not in (0, 1].
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        mlm_probability: float = 0.15,
        whole_word_mask: bool = True,
        seed: int = 0,
        pad_to_multiple_of: int | None = None,
    ) -> None:
        if not 0 < mlm_probability <= 1:
            raise ValueError(f"`mlm_probability` must be in (0, 1]. Got {mlm_probability}. BERT uses 0.15.")
        if pad_to_multiple_of is not None and pad_to_multiple_of < 1:
            raise ValueError(
                f"`pad_to_multiple_of` must be positive. Got {pad_to_multiple_of}. Leave it out or use 8."
            )
        check_tokenizer(tokenizer, ("mask", "pad"))
        self.tokenizer = tokenizer
        self.mlm_probability = mlm_probability
        self.whole_word_mask = whole_word_mask
        self.seed = seed
        self.pad_to_multiple_of = pad_to_multiple_of
        self.hands_over_draws = False
        # In shared memory: worker processes that persist over epochs see it change.
        self._epoch = torch.tensor(0).share_memory_()
        vocabulary = tokenizer.get_vocab()
        self.is_special = np.zeros(vocabulary_size(tokenizer), dtype=bool)
        self.is_special[tokenizer.all_special_ids] = True
        self.continues_word = continuing(vocabulary, len(self.is_special))
        if whole_word_mask and not self.continues_word.any() and not is_word_piece(tokenizer):
            logger.warning("No token tells where a word begins: each is masked as a word of its own.")
        exists = np.isin(np.arange(len(self.is_special)), list(vocabulary.values()))  # ids may have gaps
        self.regular_ids = np.flatnonzero(exists & ~self.is_special)
        if not len(self.regular_ids):
            raise ValueError("`tokenizer` must have tokens that are not special. Got none. Train it first.")

    @property
    def epoch(self) -> int:
        """Number of the epoch, from 0."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """
        Change the draw, in worker processes too. Call it before an epoch's iterator is made, for they work ahead.

        Args:
            epoch (`int`):
                Number of the epoch, from 0.
        """
        self._epoch.fill_(epoch)

    def with_draws(self, mlm_probability: float) -> "DataCollatorForWholeWordMasking":
        """
        One of the same epoch, now and later, that masks at another rate and hands over each token's draw: words are
        selected whose draw is under the rate. All else does not depend on the rate, so masks of a lower one follow.

        Args:
            mlm_probability (`float`):
                Expected share of words that are selected.

        Returns:
            `DataCollatorForWholeWordMasking`: Its batches have a column `mask_draws`, float64 of shape
            `(batch_size, sequence_length)`: in [0, 1), equal within a word, and 2 for special tokens.
        """
        other = copy.copy(self)
        other.mlm_probability, other.hands_over_draws = mlm_probability, True
        return other

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A worker process gets the memory itself; a copy gets memory of its own, which its workers are to see.
        vars(self).update(state)
        self._epoch.share_memory_()

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """
        Make a batch.

        Args:
            examples (`Sequence[Mapping[str, Any]]`):
                Each with `input_ids` and, optionally, `token_type_ids`, `attention_mask`, `special_tokens_mask` of the
                same length, and any number of scalars such as `next_sentence_label`. No `labels`.

        Returns:
            `dict[str, torch.Tensor]`: `input_ids`, `attention_mask`, `labels` (-100 where nothing is to be predicted)
            and `token_type_ids`, if given, all int64 of shape `(batch_size, sequence_length)`; scalars of shape
            `(batch_size,)`.

        Raises:
            ValueError: If there are no examples, or a feature is `labels`, neither known nor a scalar, or too short.
        """
        if not examples:
            raise ValueError("A batch must hold at least one example. Got none.")
        if "labels" in examples[0]:
            raise ValueError("`labels` are what this collator makes. Got examples that have them. Remove that column.")
        lengths = [len(example["input_ids"]) for example in examples]
        step = self.pad_to_multiple_of or 1
        width = -(-max(lengths) // step) * step
        ids = pad([example["input_ids"] for example in examples], lengths, width, self.tokenizer.pad_token_id)
        batch = {"attention_mask": (ids != self.tokenizer.pad_token_id).astype(np.int64)}
        for name in examples[0]:
            column = [example[name] for example in examples]
            if name in PADDING:
                batch[name] = pad(column, lengths, width, PADDING[name], name)
            elif name != "input_ids":
                batch[name] = stack(column, name)
        special = self.is_special[ids] | (batch["attention_mask"] == 0)
        if "special_tokens_mask" in batch:
            special |= batch.pop("special_tokens_mask") != 0
        batch["input_ids"], batch["labels"], draws = self.mask(ids, special)
        if self.hands_over_draws:
            batch[DRAWS] = draws
        return {name: torch.from_numpy(array) for name, array in batch.items()}

    def mask(self, ids: np.ndarray, special: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """
        Select words and replace their tokens.

        Args:
            ids (`np.ndarray` of shape `(batch_size, sequence_length)` and type int64):
                Padded token ids.
            special (`np.ndarray` of shape `(batch_size, sequence_length)` and type bool):
                Special tokens and padding: never selected, and the end of a word.

        Returns:
            `tuple[np.ndarray, np.ndarray, np.ndarray]`: Masked ids and labels, of the shape and type of `ids`, and the
            draws by which words were selected, float64 of that shape.
        """
        present = ids != self.tokenizer.pad_token_id
        # Counting real tokens only makes the draw independent of how far, and on which side, a batch is padded.
        position = present.cumsum(1).astype(np.uint64)
        starts = ~self.continues_word[ids] | special if self.whole_word_mask else np.ones_like(special)
        word = (starts & present).cumsum(1).astype(np.uint64)

        content = np.where(present, scramble(ids.astype(np.uint64) + GOLDEN * position), np.uint64(0)).sum(
            1, dtype=np.uint64
        )
        run = scramble(np.array([self.seed % 2**64, self.epoch % 2**64], dtype=np.uint64) + GOLDEN)
        key = scramble(content ^ scramble(run[:1] + GOLDEN * run[1:]))[:, None]  # one a row

        draw = np.where(special, 2.0, uniform(scramble(key + GOLDEN * word)))  # [batch, length], equal within a word
        selected = draw < np.maximum(self.mlm_probability, np.nextafter(draw.min(1, keepdims=True), 3.0))
        selected &= ~special

        fate = uniform(scramble(~key + GOLDEN * position))
        other = scramble(scramble(~key) + GOLDEN * position) % np.uint64(len(self.regular_ids))
        masked = np.where(selected & (fate < 0.8), self.tokenizer.mask_token_id, ids)
        masked = np.where(selected & (fate >= 0.8) & (fate < 0.9), self.regular_ids[other], masked)
        return masked, np.where(selected, ids, IGNORED), draw


def continuing(vocabulary: Mapping[str, int], size: int) -> np.ndarray:
    """
    Which tokens go on with the word before them, a Boolean `[size]`, by the mark that most tokens of the vocabulary
    begin with.
    """
    counts = {mark: sum(token.startswith(mark) for token in vocabulary) for mark in CONTINUES + BEGINS}
    mark = max(counts, key=lambda mark: counts[mark])
    continues = np.zeros(size, dtype=bool)
    if counts[mark]:
        for token, number in vocabulary.items():
            continues[number] = token.startswith(mark) == (mark in CONTINUES)
    return continues


def is_word_piece(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer tells words apart itself, so that tokens without a mark are whole words."""
    return tokenizer.is_fast and type(tokenizer.backend_tokenizer.model).__name__ in ("WordPiece", "WordLevel")


def scramble(values: np.ndarray) -> np.ndarray:
    """Map uint64 to uint64 one to one so that related inputs give unrelated outputs (the finaliser of splitmix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def uniform(values: np.ndarray) -> np.ndarray:
    """Map uint64 to float64 in [0, 1)."""
    return (values >> np.uint64(11)).astype(np.float64) * 2.0**-53


def pad(rows: Sequence[Any], lengths: list[int], width: int, value: int, name: str = "input_ids") -> np.ndarray:
    """
    Pad rows of integers (lists, arrays or tensors) on the right with `value`: int64 `[rows, width]`.

    Raises:
        ValueError: If a row of the feature `name` has another length than `lengths` says.
    """
    padded = np.full((len(rows), width), value, dtype=np.int64)
    for target, row, length in zip(padded, rows, lengths, strict=True):
        if len(row) != length:
            raise ValueError(f"`{name}` must be as long as `input_ids` ({length}). Got {len(row)}. Tokenize again.")
        target[:length] = row
    return padded


def stack(column: Sequence[Any], name: str) -> np.ndarray:
    """
    Numbers, or arrays or tensors without a dimension, as one array.

    Raises:
        ValueError: If an entry of the feature `name` is none.
    """
    array = np.array([np.asarray(entry) for entry in column]) if np.ndim(column[0]) == 0 else np.empty((0, 0))
    if array.ndim != 1 or array.dtype.kind not in "biuf":
        raise ValueError(
            f"A feature must be a number, or one of `input_ids`, {', '.join(f'`{known}`' for known in PADDING)}."
            f" Got `{name}` with {column[0]!r}. Remove that column from the dataset."
        )
    return array.astype(np.float32) if array.dtype.kind == "f" else array.astype(np.int64)

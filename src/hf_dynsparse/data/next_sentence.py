"""Next-sentence pairs for BERT pre-training (Devlin et al., 2019, section 3.1 and appendix A.2)."""

import re
from collections.abc import Iterable, Iterator, Sequence
from random import Random

from transformers import PreTrainedTokenizerBase


SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]?\s+(?=[\"'(\[]?[A-Z0-9])")
NUM_SPECIAL_TOKENS = 3  # [CLS] A [SEP] B [SEP]
IS_NEXT, IS_RANDOM = 0, 1


def build_next_sentence_pairs(
    documents: Iterable[Sequence[Sequence[int]]],
    tokenizer: PreTrainedTokenizerBase,
    max_seq_length: int = 128,
    seed: int = 0,
    short_seq_probability: float = 0.1,
) -> Iterator[dict[str, list[int] | int]]:
    """
    Pair each stretch of text A with the text B that follows it or, half of the time, with text of another document.

    The pairs of a document depend on (`seed`, its number, the documents), not on what was drawn for others.

    Args:
        documents (`Iterable[Sequence[Sequence[int]]]`):
            Token ids without special tokens: a document is a list of segments, best sentences. What does not fit into
            one pair is cut off, so long segments lose text. Read whole before the first pair.
        tokenizer ([`PreTrainedTokenizerBase`]):
            Gives `[CLS]` and `[SEP]`.
        max_seq_length (`int`, *optional*, defaults to 128):
            Most tokens of a pair, special tokens included.
        seed (`int`, *optional*, defaults to 0):
            Seed of the draw.
        short_seq_probability (`float`, *optional*, defaults to 0.1):
            Share of pairs that aim at a random shorter length, so that the model meets short inputs too.

    Yields:
        `dict`: `input_ids`, `token_type_ids`, `attention_mask`, `special_tokens_mask`, lists of at most
        `max_seq_length` integers, and `next_sentence_label`: 0 if B follows A, 1 if it is random.

    Raises:
        ValueError: If fewer than two documents hold text, `max_seq_length` has no room for two tokens, or the
            tokenizer lacks a token.
    """
    room = max_seq_length - NUM_SPECIAL_TOKENS
    if room < 2:
        raise ValueError(
            f"`max_seq_length` must be at least {NUM_SPECIAL_TOKENS + 2}: three special tokens, one of A, one of B."
            f" Got {max_seq_length}. BERT uses 128 and 512."
        )
    if tokenizer.cls_token_id is None or tokenizer.sep_token_id is None:
        raise ValueError(
            "`tokenizer` must have a classification and a separator token."
            f" Got {tokenizer.cls_token!r} and {tokenizer.sep_token!r}. Set both."
        )
    filled = [[list(segment) for segment in document if len(segment)] for document in documents]
    filled = [document for document in filled if document]
    if len(filled) < 2:
        raise ValueError(
            f"`documents` must hold at least two documents with text, since a random B comes from another one."
            f" Got {len(filled)}. Separate documents in the file with a blank line."
        )
    for number in range(len(filled)):
        random = Random(f"{seed}-{number}")
        for first, second, label in document_pairs(filled, number, room, random, short_seq_probability):
            truncate_pair(first, second, room, random)
            yield encode_pair(first, second, label, tokenizer)


def document_pairs(
    documents: list[list[list[int]]], number: int, room: int, random: Random, short_seq_probability: float
) -> Iterator[tuple[list[int], list[int], int]]:
    """
    Cut document `number` into pairs of `room` tokens, a share of them shorter: A and B, not yet truncated, neither
    empty, and the label.
    """
    document = documents[number]
    start = 0
    while start < len(document):
        target = random.randint(2, room) if random.random() < short_seq_probability else room
        stop = take(document, start, target)
        split = random.randint(start + 1, stop - 1) if stop - start > 1 else stop
        first = join(document, start, split)
        # A chunk of a single segment has no continuation of its own.
        if split == stop or random.random() < 0.5:
            other = documents[(number + random.randrange(1, len(documents))) % len(documents)]
            begin = random.randrange(len(other))
            yield first, join(other, begin, take(other, begin, target - len(first))), IS_RANDOM
            start = split  # what B would have been is not lost
        else:
            yield first, join(document, split, stop), IS_NEXT
            start = stop


def take(document: list[list[int]], start: int, target: int) -> int:
    """The end of the shortest run of segments from `start` that holds `target` tokens; at least one segment."""
    length = len(document[start])
    stop = start + 1
    while stop < len(document) and length < target:
        length += len(document[stop])
        stop += 1
    return stop


def join(document: list[list[int]], start: int, stop: int) -> list[int]:
    """The tokens of segments `start` to `stop`, as a new list."""
    return [token for segment in document[start:stop] for token in segment]


def truncate_pair(first: list[int], second: list[int], room: int, random: Random) -> None:
    """
    Shorten A and B in place to `room` tokens, the longer one first, a token at a time from its front or back, as
    `random` decides: neither end of a text is favoured.
    """
    while len(first) + len(second) > room:
        longer = first if len(first) > len(second) else second
        longer.pop(0 if random.random() < 0.5 else -1)


def encode_pair(
    first: list[int], second: list[int], label: int, tokenizer: PreTrainedTokenizerBase
) -> dict[str, list[int] | int]:
    """`[CLS] A [SEP] B [SEP]`, with a label that is 0 if B follows A, 1 if it is random."""
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    ids = [cls, *first, sep, *second, sep]
    return {
        "input_ids": ids,
        "token_type_ids": [0] * (len(first) + 2) + [1] * (len(second) + 1),
        "attention_mask": [1] * len(ids),
        "special_tokens_mask": [1, *[0] * len(first), 1, *[0] * len(second), 1],
        "next_sentence_label": label,
    }


def split_sentences(paragraph: str) -> list[str]:
    """
    Split a paragraph where a full stop, question or exclamation mark is followed by a space and a capital or digit.

    Together the sentences hold every word of the paragraph, which is one line of text. Abbreviations are not known:
    good enough for the segments of next-sentence pairs, not for linguistics.
    """
    sentences: list[str] = []
    start = 0
    for match in SENTENCE_END.finditer(paragraph):
        # A closing quote or bracket belongs to the sentence before it.
        sentences.append(paragraph[start : match.end()].strip())
        start = match.end()
    if paragraph[start:].strip():
        sentences.append(paragraph[start:].strip())
    return sentences

"""A lower-case WordPiece tokenizer of one's own, without a download."""

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.trainers import WordPieceTrainer
from transformers import BertTokenizer

from .pieces import split_line


MAX_ALPHABET = 1000
MIN_ALPHABET = 64  # letters, digits and punctuation of a European language


def train_wordpiece_tokenizer(
    texts: Iterable[str], vocab_size: int = 8192, min_frequency: int = 2, model_max_length: int = 512
) -> BertTokenizer:
    """
    Train the tokenizer of BERT (lower case, accents stripped, WordPiece) on texts. The same texts give the same
    vocabulary. Words over 100 letters are left out: such a word is `[UNK]` to the tokenizer, whatever it has learned.

    Args:
        texts (`Iterable[str]`):
            Training texts, such as paragraphs, of any length; read once and held in memory.
        vocab_size (`int`, *optional*, defaults to 8192):
            Size of the vocabulary, the five special tokens included. A multiple of the block size keeps the
            embeddings aligned. Few texts give a smaller one.
        min_frequency (`int`, *optional*, defaults to 2):
            Times a pair of pieces must occur to become one piece.
        model_max_length (`int`, *optional*, defaults to 512):
            Longest input of the model; a fresh tokenizer would not have any.

    Returns:
        `BertTokenizer`: Ready for `save_pretrained`; `AutoTokenizer` reads it back.

    Raises:
        ValueError: If `vocab_size` leaves no room beside the special tokens, or the texts hold no word.
    """
    blank = BertTokenizer(do_lower_case=True, model_max_length=model_max_length)
    num_special = len(blank)
    if vocab_size <= num_special:
        raise ValueError(
            f"`vocab_size` must be larger than the {num_special} special tokens. Got {vocab_size}. Choose 1,000 or"
            " more for real text."
        )
    texts = learnable_pieces(texts, blank)
    # A character takes up to two places in the vocabulary: a small one must have room for longer pieces.
    alphabet = count_alphabet(texts, blank, min(MAX_ALPHABET, max(MIN_ALPHABET, vocab_size // 4)))
    if not alphabet:
        raise ValueError("`texts` must hold at least one word. Got nothing to learn from: is the iterator used up?")
    # The trainer numbers the characters that continue a word in the order of a randomly seeded hash table, and breaks
    # ties between merges by these numbers. Listed in advance as special tokens, they get numbers of their own.
    special = [token for token, _ in sorted(blank.get_vocab().items(), key=lambda item: item[1])]
    pieces = train_vocabulary(texts, blank, special, alphabet, len(special), min_frequency)
    special += sorted(piece for piece in pieces if piece.startswith("##"))
    vocab = train_vocabulary(texts, blank, special, alphabet, vocab_size, min_frequency)
    return BertTokenizer(vocab=vocab, do_lower_case=True, model_max_length=model_max_length)


def learnable_pieces(texts: Iterable[str], blank: BertTokenizer) -> list[str]:
    """
    Lines of texts, long ones in pieces, without the words that are too long for WordPiece: learning takes time that
    grows with the square of the length of a word. `blank` says what a word is, and how long one may be.
    """
    backend: Any = blank.backend_tokenizer
    longest = backend.model.max_input_chars_per_word

    def drop_long_words(run: re.Match[str]) -> str:
        words = backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(run.group()))
        return " ".join(word for word, _ in words if len(word) <= longest)

    # Cheap to find, and only seldom more than one word.
    suspect = re.compile(rf"\S{{{longest + 1},}}")
    pieces = (piece for text in texts for line in text.splitlines() for piece in split_line(line))
    return [suspect.sub(drop_long_words, piece) for piece in pieces]


def count_alphabet(texts: Iterable[str], blank: BertTokenizer, limit: int) -> list[str]:
    """The most frequent characters of texts normalised by `blank`, at most `limit`, in their own order."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(blank.backend_tokenizer.normalizer.normalize_str(text))
    ranked = sorted((-count, character) for character, count in counts.items() if not character.isspace())
    return sorted(character for _, character in ranked[:limit])


def train_vocabulary(
    texts: list[str],
    blank: BertTokenizer,
    special: list[str],
    alphabet: list[str],
    vocab_size: int,
    min_frequency: int,
) -> dict[str, int]:
    """
    Learn a WordPiece vocabulary from the characters of `alphabet`: pieces and their numbers, those in `special` first.
    Both are in it even if there are more than `vocab_size`. `blank` normalises, and splits words.
    """
    tokenizer = Tokenizer(WordPiece(unk_token=blank.unk_token))
    tokenizer.normalizer = blank.backend_tokenizer.normalizer
    tokenizer.pre_tokenizer = blank.backend_tokenizer.pre_tokenizer
    trainer = WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=special,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.get_vocab()

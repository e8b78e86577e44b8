"""A lower-case WordPiece tokenizer of one's own, without a download."""

from collections import Counter
from collections.abc import Iterable

from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.trainers import WordPieceTrainer
from transformers import BertTokenizer


MAX_ALPHABET = 1000
MIN_ALPHABET = 64  # letters, digits and punctuation of a European language


def train_wordpiece_tokenizer(
    texts: Iterable[str], vocab_size: int = 8192, min_frequency: int = 2, model_max_length: int = 512
) -> BertTokenizer:
    """
    Train the tokenizer of BERT (lower case, accents stripped, WordPiece) on texts. The same texts give the same
    vocabulary.

    Args:
        texts (`Iterable[str]`):
            Training texts, such as paragraphs; read once and held in memory.
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
    texts = list(texts)
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


def count_alphabet(texts: Iterable[str], blank: BertTokenizer, limit: int) -> list[str]:
    """
    The most frequent characters of normalised texts, at most `limit`, in their own order.

    Args:
        texts (`Iterable[str]`):
            Training texts.
        blank ([`BertTokenizer`]):
            Tokenizer to normalise with.
        limit (`int`):
            Each character takes up to two places in the vocabulary: a small one must have room for longer pieces.
    """
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
    Learn a WordPiece vocabulary.

    Args:
        texts (`list[str]`):
            Training texts.
        blank ([`BertTokenizer`]):
            Tokenizer to normalise and split words with.
        special (`list[str]`):
            Pieces that come first in the vocabulary.
        alphabet (`list[str]`):
            The only characters to learn from.
        vocab_size (`int`):
            Pieces to stop at; `special` and the alphabet are learned even if there are more.
        min_frequency (`int`):
            Times a pair of pieces must occur to become one piece.

    Returns:
        `dict[str, int]`: Pieces and their numbers.
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

"""Text into batches: the embedded corpus, documents, a tokenizer, next-sentence pairs and whole-word masking."""

from .collators import DataCollatorForWholeWordMasking
from .corpus import EmbeddedCorpus, embedded_corpus
from .documents import read_documents, split_sentences
from .next_sentence import build_next_sentence_pairs
from .tokenizer import train_wordpiece_tokenizer


__all__ = [
    "DataCollatorForWholeWordMasking",
    "EmbeddedCorpus",
    "build_next_sentence_pairs",
    "embedded_corpus",
    "read_documents",
    "split_sentences",
    "train_wordpiece_tokenizer",
]

"""Text into batches: the embedded corpus, sentences, a tokenizer, next-sentence pairs and whole-word masking."""

from .collators import DataCollatorForWholeWordMasking
from .corpus import EmbeddedCorpus, embedded_corpus
from .frequencies import count_pieces
from .glue import GLUE_TASKS, GlueTask, glue_metrics, read_glue
from .next_sentence import build_next_sentence_pairs, split_sentences
from .pieces import split_line
from .tokenizer import train_wordpiece_tokenizer


__all__ = [
    "GLUE_TASKS",
    "DataCollatorForWholeWordMasking",
    "EmbeddedCorpus",
    "GlueTask",
    "build_next_sentence_pairs",
    "count_pieces",
    "embedded_corpus",
    "glue_metrics",
    "read_glue",
    "split_line",
    "split_sentences",
    "train_wordpiece_tokenizer",
]

"""Paragraphs into sentences."""

import re


SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]?\s+(?=[\"'(\[]?[A-Z0-9])")


def split_sentences(paragraph: str) -> list[str]:
    """
    Split a paragraph where a full stop, question or exclamation mark is followed by a space and a capital or digit.

    Abbreviations are not known to it: good enough for the segments of next-sentence pairs, not for linguistics.

    Args:
        paragraph (`str`):
            One line of text.

    Returns:
        `list[str]`: The sentences, in order; together they hold every word of the paragraph.
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

"""Paragraphs into sentences."""

import pytest

from hf_dynsparse.data import split_sentences


@pytest.mark.parametrize(
    ("paragraph", "sentences"),
    [
        ("One two. Three four? Five!", ["One two.", "Three four?", "Five!"]),
        ('He said "no." Then (it was late.) He left', ['He said "no."', "Then (it was late.)", "He left"]),
        ("Version 2.0 of torch.nn is e.g. here.", ["Version 2.0 of torch.nn is e.g. here."]),
        ("", []),
    ],
)
def test_split_sentences(paragraph: str, sentences: list[str]) -> None:
    assert split_sentences(paragraph) == sentences

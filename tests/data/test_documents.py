"""Text files into documents and sentences."""

import gzip
from pathlib import Path

import pytest

from hf_dynsparse.data import read_documents, split_sentences


def test_blank_lines_separate_documents(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("\n\nOne.\nTwo.\n\n \nThree.\n")
    assert list(read_documents([file])) == [["One.", "Two."], ["Three."]]


def test_titles_separate_documents_where_there_are_titles(tmp_path: Path) -> None:
    file = tmp_path / "wiki.txt.gz"
    with gzip.open(file, "wt", encoding="utf-8") as stream:
        stream.write(" \n = First = \n \n One é . \n \n = = Section = = \n \n Two . \n = Second = \n Three . \n")
    assert list(read_documents([str(file)])) == [["One é .", "Two ."], ["Three ."]]


def test_several_files_follow_each_other(tmp_path: Path) -> None:
    first, second = tmp_path / "1.txt", tmp_path / "2.txt"
    first.write_text("One.")
    second.write_text("Two.")
    assert list(read_documents([second, first])) == [["Two."], ["One."]]


def test_errors(tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("\n= Title =\n\n")
    with pytest.raises(ValueError, match="at least one paragraph"):
        list(read_documents([empty]))
    with pytest.raises(FileNotFoundError, match=r"missing\.txt"):
        list(read_documents([tmp_path / "missing.txt"]))
    with pytest.raises(ValueError, match="list of files"):
        list(read_documents(str(empty)))


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

"""Plain-text files into documents, documents into sentences."""

import gzip
import re
from collections.abc import Iterator, Sequence
from pathlib import Path


HEADING = re.compile(r"^=(?: =)* .* (?:= )*=$")
TITLE = re.compile(r"^= [^=].* =$")
SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]?\s+(?=[\"'(\[]?[A-Z0-9])")


def read_documents(paths: Sequence[str | Path]) -> Iterator[list[str]]:
    """
    Read text files, plain or compressed (`.gz`), as documents.

    In a file that starts with a title (`= Some Title =`, as in WikiText) every title starts a document and blank lines
    mean nothing; in any other file blank lines separate documents. Titles and headings are no running text and are
    left out.

    Args:
        paths (`Sequence[str]` or `Sequence[Path]`):
            UTF-8 files, one paragraph a line.

    Yields:
        `list[str]`: The paragraphs of one document; never empty.

    Raises:
        FileNotFoundError: If a file does not exist.
        ValueError: If `paths` is a single path, or a file holds no text.
    """
    if isinstance(paths, str | Path):
        raise ValueError(f"`paths` must be a list of files. Got the single path {str(paths)!r}. Put it into a list.")
    for path in map(Path, paths):
        if not path.is_file():
            raise FileNotFoundError(
                f"Every path must be a text file. Got {str(path)!r}, which is none. Check the path."
            )
        empty = True
        for document in read_file(path):
            empty = False
            yield document
        if empty:
            raise ValueError(f"A text file must hold at least one paragraph. Got {str(path)!r}, which holds none.")


def read_file(path: Path) -> Iterator[list[str]]:
    """
    Read one file as documents; see `read_documents`.

    Args:
        path (`Path`):
            UTF-8 file, compressed if its name ends in `.gz`.
    """
    titled: bool | None = None
    paragraphs: list[str] = []
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8", newline="\n") as stream:
        for raw in stream:
            line = raw.strip()
            if titled is None and line:
                titled = TITLE.match(line) is not None
            if paragraphs and (TITLE.match(line) if titled else not line):
                yield paragraphs
                paragraphs = []
            if line and not HEADING.match(line):
                paragraphs.append(line)
    if paragraphs:
        yield paragraphs


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

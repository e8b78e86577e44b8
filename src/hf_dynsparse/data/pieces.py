"""Long lines in pieces: what a tokenizer is given has a bounded length."""

import re
from collections.abc import Iterator


# Of a longer text tokenizers keep about 80 bytes a character at once.
MAX_LENGTH = 10_000


def split_line(line: str, limit: int = MAX_LENGTH) -> Iterator[str]:
    """
    A line in pieces of at most `limit` characters, cut between words; only a run of so many characters without a
    space is cut within. Blank pieces are left out.

    Args:
        line (`str`):
            Text of any length.
        limit (`int`, *optional*, defaults to 10,000):
            Most characters of a piece, at least 2.
    """
    until_a_word_ends = rf"\S(?:.{{0,{limit - 2}}}\S)?(?!\S)"
    return (piece.group() for piece in re.finditer(rf"{until_a_word_ends}|\S{{1,{limit}}}", line, re.DOTALL))

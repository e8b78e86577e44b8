"""Tables as text: aligned for a terminal, or in Markdown."""

from collections.abc import Collection, Iterable, Sequence
from typing import Any


def plain_table(rows: Sequence[Sequence[str]], least: Sequence[int] = (), left: Collection[int] = (0,)) -> str:
    """
    Rows as lines, their columns two spaces apart.

    Args:
        rows (`Sequence[Sequence[str]]`): the headings, then the cells.
        least (`Sequence[int]`, *optional*): least widths of the first columns.
        left (`Collection[int]`): columns that are aligned to the left, the others to the right.
    """
    least = [*least, *[0] * (len(rows[0]) - len(least))]
    widths = [max(width, *map(len, column)) for width, column in zip(least, zip(*rows, strict=True), strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if place in left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def markdown_table(columns: Iterable[Any], rows: Iterable[Iterable[Any]], right: Collection[int] = ()) -> str:
    """
    A table in Markdown.

    Args:
        columns (`Iterable`): the headings.
        rows (`Iterable[Iterable]`): the cells.
        right (`Collection[int]`): columns that are aligned to the right.
    """
    columns = list(columns)
    rule = "|".join("---:" if place in right else "---" for place in range(len(columns)))
    first, *rest = (f"| {' | '.join(map(str, cells))} |" for cells in (columns, *rows))
    return "\n".join([first, f"|{rule}|", *rest])

"""Sizes of blocks: what a user may write, and how many blocks a matrix and a density give."""

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from math import floor


Sides = int | tuple[int, int] | list[int]


BlockSize = Sides | dict[str, Sides]  # one for all layers, or by patterns of their names


# As written on a command line: sides, and sides for a pattern.
_SIDES = r"\d+(?:x\d+)?"


_NAMED = rf"[^=,]+={_SIDES}"


def as_block_shape(block_size: Sides) -> tuple[int, int]:
    """
    Read a block size: an int `B` means square `B x B` blocks, a pair means `(rows, columns)`.

    Raises:
        ValueError: if a side is not a positive integer.
    """
    sides = tuple(block_size) if isinstance(block_size, tuple | list) else (block_size, block_size)
    if len(sides) != 2 or not all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in sides):
        raise ValueError(
            "`block_size` must be a positive integer or a pair of them (rows, columns). "
            f"Got {block_size!r}. Choose for example 1, 4, 16 or (1, 4)."
        )
    return sides


def parse_block_size(text: str) -> BlockSize:
    """
    Read a block size from a command line: `"16"`, `"1x4"` for rows x columns, or `"*attention*=4,*=16"` for sizes by
    patterns of layer names.

    Raises:
        ValueError: if it is none of them.
    """
    if not re.fullmatch(rf"{_SIDES}|{_NAMED}(?:,{_NAMED})*", text):
        raise ValueError(
            "`--block_size` must be a number such as 16, two such as 1x4, or sizes by layer names such as "
            f"*attention*=4,*=16. Got {text!r}."
        )
    if "=" not in text:
        return _read_sides(text)
    return {pattern: _read_sides(size) for pattern, size in (part.split("=") for part in text.split(","))}


def _read_sides(text: str) -> Sides:
    rows, columns = as_block_shape([int(side) for side in (text.split("x") * 2)[:2]])
    return (rows, columns) if "x" in text else rows


def block_shapes_of(names: Iterable[str], block_size: BlockSize) -> dict[str, tuple[int, int]]:
    """
    The block shape of each layer of `names`. Of a mapping, the longest pattern that matches a name gives its size: the
    order of entries does not survive in a config.json, which is sorted.

    Args:
        block_size (`int`, `tuple[int, int]` or `dict[str, int | tuple[int, int]]`): one for all, or by shell-style
            patterns of names, such as `{"*attention*": 4, "*": 16}`.

    Raises:
        ValueError: for a pattern without a layer, or a layer without a pattern.
    """
    if not isinstance(block_size, dict):
        return dict.fromkeys(names, as_block_shape(block_size))
    shapes, unused = {}, set(block_size)
    for name in names:
        matching = [pattern for pattern in block_size if fnmatchcase(name, pattern)]
        if not matching:
            raise ValueError(
                f"`block_size` must give a size for every layer. Got none for `{name}` among {', '.join(block_size)}. "
                "Add the pattern `*`."
            )
        unused.difference_update(matching)
        shapes[name] = as_block_shape(block_size[max(matching, key=lambda pattern: (len(pattern), pattern))])
    if unused:
        raise ValueError(
            f"Every pattern of `block_size` must match a layer. Got {min(unused)!r}. Layers of this model: "
            f"{', '.join([*shapes][:6])}, ..."
        )
    return shapes


def block_grid(shape: tuple[int, int], block_shape: tuple[int, int], name: str = "the matrix") -> tuple[int, int]:
    """
    Number of block rows and block columns of a matrix of `shape` `(out_features, in_features)`.

    Raises:
        ValueError: if the block does not divide both sides; `name` says which matrix.
    """
    (height, width), (rows, columns) = shape, block_shape
    if height % rows or width % columns:
        fits = [side for side in (64, 32, 16, 8, 4, 2, 1) if height % side == 0 and width % side == 0]
        raise ValueError(
            f"`block_size` must divide both sides of {name} ({height} x {width}). "
            f"Got {rows} x {columns}. Choose {', '.join(map(str, fits[::-1]))}."
        )
    return height // rows, width // columns


def check_sparsity(sparsity: float) -> float:
    """
    Return `sparsity` if it lies in [0, 1).

    Raises:
        ValueError: if it does not.
    """
    if not 0.0 <= sparsity < 1.0:
        raise ValueError(
            f"`sparsity` is the share of inactive positions and must lie in [0, 1). Got {sparsity}. "
            "Choose 0.9 to keep one position in ten."
        )
    return sparsity


def count_active_blocks(num_blocks: int, density: float) -> int:
    """
    Number of active blocks of a tensor, rounded half up and at least one: `max(1, floor(density * blocks + 1/2))`.
    """
    return min(num_blocks, max(1, floor(density * num_blocks + 0.5)))

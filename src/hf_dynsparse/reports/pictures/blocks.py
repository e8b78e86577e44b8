"""The blocks of a layer painted as an array of pixels."""

from collections.abc import Iterator, Sequence

import numpy as np

from ...topology.frames import Frame


# What a block may be, from the least to the most; the later wins.
KINDS = {"never active": "#F4F4F1", "active before": "#9CC3DB", "active": "#00304D", "newborn": "#D55E00"}
MAX_CELLS = 256  # a side of a picture; beyond, a cell shows the mean colour of several blocks
PIXELS = 512  # the longer side of a picture, at most


def changes(frames: Sequence[Frame]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """
    For each frame, which blocks were not active in the frame before, and which were in this or any before: two Boolean
    maps `(block_rows, block_columns)`. In the first frame no block is new.
    """
    before = ever_active = frames[0].block_map
    for frame in frames:
        ever_active = ever_active | frame.block_map
        yield frame.block_map & ~before, ever_active
        before = frame.block_map


def paint_blocks(active: np.ndarray, newborn: np.ndarray, ever_active: np.ndarray) -> np.ndarray:
    """
    The block map of a layer as a picture in the colours of `KINDS`.

    Args:
        active, newborn, ever_active (`np.ndarray` of shape `(block_rows, block_columns)`): Boolean.

    Returns:
        `np.ndarray` of shape `(height, width, 3)`: RGB of `np.uint8`, `height` and `width` at most 512.
    """
    kinds = np.select([newborn, active, ever_active], [3, 2, 1], 0)
    blocks = colours_of_kinds()[kinds]  # [block_rows, block_columns, 3]
    cells = mean_of_squares(blocks, blocks_in_cell(kinds.shape)).round().astype(np.uint8)
    pixels = PIXELS // max(cells.shape[:2])
    return cells.repeat(pixels, axis=0).repeat(pixels, axis=1)


def blocks_in_cell(grid: tuple[int, ...]) -> int:
    """Side of the square of blocks, 1 for a small layer, that a cell of the picture shows."""
    return -(-max(grid) // MAX_CELLS)


def colours_of_kinds() -> np.ndarray:
    """RGB of `KINDS`, of shape `(4, 3)`."""
    return np.array([list(bytes.fromhex(colour[1:])) for colour in KINDS.values()], dtype=float)


def mean_of_squares(blocks: np.ndarray, factor: int) -> np.ndarray:
    """Means over `factor x factor` squares of `[rows, columns, ...]`; those at the far sides may be cut."""
    total = blocks.astype(float)
    count = np.ones_like(total)
    for axis, side in enumerate(blocks.shape[:2]):
        starts = np.arange(0, side, factor)
        total, count = np.add.reduceat(total, starts, axis), np.add.reduceat(count, starts, axis)
    return total / count

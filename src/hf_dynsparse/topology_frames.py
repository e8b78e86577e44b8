"""The topology of one layer over a run: a frame at the start and after every update, its file, and its colours."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np

from .files import write_atomically


HISTORY_FOLDER = "topology_history"  # in the folder of a run
# What a block may be, from the least to the most; the later wins.
KINDS = {"never active": "#F4F4F1", "active before": "#9CC3DB", "active": "#00304D", "newborn": "#D55E00"}
MAX_CELLS = 256  # a side of a picture; beyond, a cell shows the mean colour of several blocks
PIXELS = 512  # the longer side of a picture, at most


@dataclass(frozen=True)
class Frame:
    """
    Which blocks of a layer are active.

    Args:
        layer (`str`): name of the layer.
        update (`int`): topology updates done so far.
        step (`int`): optimiser steps done so far.
        block_map (`np.ndarray` of shape `(block_rows, block_columns)`): Boolean.
    """

    layer: str
    update: int
    step: int
    block_map: np.ndarray


def write_frame(run_dir: str | Path, frame: Frame) -> None:
    """
    Write one frame, a bit a block, into the history of a run; another of the same step is replaced. A process that is
    killed meanwhile leaves none that is half written.
    """
    content = BytesIO()
    np.savez_compressed(
        content,
        blocks=np.packbits(frame.block_map),
        grid=frame.block_map.shape,
        about=np.array([frame.update, frame.step]),
        layer=frame.layer,
    )
    write_atomically(Path(run_dir, HISTORY_FOLDER, f"step-{frame.step:09d}.npz"), content.getvalue())


def read_history(run_dir: str | Path) -> list[Frame]:
    """
    The frames of a run in the order of their steps; none if it kept no history.

    Raises:
        ValueError: if a file is damaged, or of a layer of another size, naming it.
    """
    files = history_files(run_dir)
    frames = [_read_frame(file) for file in files]
    for file, frame in zip(files, frames, strict=True):
        if frame.block_map.shape != frames[0].block_map.shape:
            raise ValueError(
                f"All frames of a topology history must have as many blocks. Got {file} with {frame.block_map.shape}, "
                f"and {files[0]} with {frames[0].block_map.shape}. Delete those of another run."
            )
    return frames


def history_files(run_dir: str | Path) -> list[Path]:
    """The files of the frames of a run, in the order of their steps."""
    files = sorted(Path(run_dir, HISTORY_FOLDER).glob("step-*.npz"))
    return [file for file in files if file.stem.removeprefix("step-").isdecimal() and file.is_file()]


def forget_frames(run_dir: str | Path, after: int) -> None:
    """Remove the frames of the steps beyond `after`, which a resumed run repeats; -1 removes all."""
    for file in history_files(run_dir):
        if int(file.stem.removeprefix("step-")) > after:
            file.unlink()


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


def _read_frame(file: Path) -> Frame:
    try:
        with file.open("rb") as content, np.load(content) as arrays:
            grid, about, blocks = arrays["grid"], arrays["about"], arrays["blocks"]
            layer = str(arrays["layer"])
    except OSError:
        raise
    except Exception as error:  # what NumPy, zipfile and zlib raise has no base in common
        raise _damaged(file, str(error)) from error
    whole = grid.dtype.kind == about.dtype.kind == "i" and grid.shape == about.shape == (2,) and grid.min() > 0
    rows, columns = grid.tolist() if whole else (0, 0)
    if blocks.dtype != np.uint8 or blocks.shape != (-(-rows * columns // 8),) or not whole:
        raise _damaged(file, f"a grid of {grid.tolist()} with {blocks.size} bytes, at {about.tolist()}")
    update, step = about.tolist()
    block_map = np.unpackbits(blocks, count=rows * columns).reshape(rows, columns)
    return Frame(layer, update, step, block_map.astype(bool))


def _damaged(file: Path, reason: str) -> ValueError:
    return ValueError(f"A frame of a topology history must be whole. Got {file}: {reason}. Delete it.")

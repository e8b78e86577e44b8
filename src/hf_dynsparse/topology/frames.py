"""The topology of one layer over a run: a frame at the start and after every update, its file, and its colours."""

from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np

from ..files import write_atomically


HISTORY_FOLDER = "topology_history"  # in the folder of a run


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

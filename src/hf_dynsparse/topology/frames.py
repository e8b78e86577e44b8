"""The topology of the layers of a run: frames at the start and after every update, and their files."""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

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


def write_frame(run_dir: str | Path, frame: Frame, others: Mapping[str, np.ndarray] | None = None) -> None:
    """
    Write one frame, a bit a block, into the history of a run; another of the same step is replaced. A process that is
    killed meanwhile leaves none that is half written.

    Args:
        others (`Mapping[str, np.ndarray]`, *optional*): block maps of more layers after the same update, by name.
    """
    arrays: dict[str, Any] = {
        "blocks": np.packbits(frame.block_map),
        "grid": frame.block_map.shape,
        "about": np.array([frame.update, frame.step]),
        "layer": frame.layer,
    }
    if others:
        arrays["other_layers"] = np.array(list(others))
        arrays["other_grids"] = np.array([block_map.shape for block_map in others.values()])
        arrays["other_blocks"] = np.packbits(np.concatenate([block_map.ravel() for block_map in others.values()]))
    content = BytesIO()
    np.savez_compressed(content, **arrays)
    write_atomically(Path(run_dir, HISTORY_FOLDER, f"step-{frame.step:09d}.npz"), content.getvalue())


def read_history(run_dir: str | Path) -> list[Frame]:
    """
    The frames of the layer that a run keeps for its moving picture, in the order of their steps; none if it kept none.

    Raises:
        ValueError: if a file is damaged, or of a layer of another size, naming it.
    """
    files = history_files(run_dir)
    frames = [_read_frames(file)[0] for file in files]
    _check_sizes(files, frames)
    return frames


def read_layers(run_dir: str | Path) -> dict[str, list[Frame]]:
    """
    As [`read_history`], of every layer that a run has kept, by name. Runs of earlier versions have kept one.
    """
    files: dict[str, list[Path]] = {}
    layers: dict[str, list[Frame]] = {}
    for file in history_files(run_dir):
        for frame in _read_frames(file):
            files.setdefault(frame.layer, []).append(file)
            layers.setdefault(frame.layer, []).append(frame)
    for name, frames in layers.items():
        _check_sizes(files[name], frames)
    return layers


def history_files(run_dir: str | Path) -> list[Path]:
    """The files of the frames of a run, in the order of their steps."""
    files = sorted(Path(run_dir, HISTORY_FOLDER).glob("step-*.npz"))
    return [file for file in files if file.stem.removeprefix("step-").isdecimal() and file.is_file()]


def forget_frames(run_dir: str | Path, after: int) -> None:
    """Remove the frames of the steps beyond `after`, which a resumed run repeats; -1 removes all."""
    for file in history_files(run_dir):
        if int(file.stem.removeprefix("step-")) > after:
            file.unlink()


def _read_frames(file: Path) -> list[Frame]:
    """Of all layers in a file; that of the moving picture comes first."""
    try:
        with file.open("rb") as content, np.load(content) as arrays:
            held = dict(arrays)
        names, grids = [str(held["layer"])], held["grid"][None]
        block_maps = _unpack(held["blocks"], grids)
        if "other_layers" in held:
            names += held["other_layers"].tolist()
            block_maps += _unpack(held["other_blocks"], held["other_grids"])
        update, step = (operator.index(number) for number in held["about"])
        return [Frame(name, update, step, block_map) for name, block_map in zip(names, block_maps, strict=True)]
    except OSError:
        raise
    except Exception as error:  # what NumPy, zipfile and zlib raise has no base in common
        raise ValueError(f"A frame of a topology history must be whole. Got {file}: {error}. Delete it.") from error


def _unpack(blocks: np.ndarray, grids: np.ndarray) -> list[np.ndarray]:
    """The block maps of those `grids` `[layers, 2]` that stand in `blocks` one after the other, a bit a block."""
    if grids.dtype.kind != "i" or grids.ndim != 2 or grids.shape[1] != 2 or grids.min() < 1:
        raise ValueError(f"grids of {grids.tolist()}")
    counts = [rows * columns for rows, columns in grids.tolist()]
    if blocks.dtype != np.uint8 or blocks.shape != (-(-sum(counts) // 8),):
        raise ValueError(f"grids of {grids.tolist()} with {blocks.size} bytes")
    flat = np.unpackbits(blocks, count=sum(counts)).astype(bool)
    each = np.split(flat, np.cumsum(counts)[:-1])
    return [block_map.reshape(grid) for block_map, grid in zip(each, grids.tolist(), strict=True)]


def _check_sizes(files: Sequence[Path], frames: Sequence[Frame]) -> None:
    for file, frame in zip(files, frames, strict=True):
        if frame.block_map.shape != frames[0].block_map.shape:
            raise ValueError(
                f"All frames of a topology history must have as many blocks. Got {file} with {frame.block_map.shape}, "
                f"and {files[0]} with {frames[0].block_map.shape}. Delete those of another run."
            )

"""Maps of the active blocks of one layer or of all."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from os.path import commonprefix

import numpy as np

from .blocks import mean_of_squares
from .style import block_colours, picture


MAX_CELLS = 1024  # per side of a block map; beyond, a cell shows the mean of several blocks
MAX_PANEL_CELLS = 192  # the same where a panel shows one of many layers


def plot_block_map(
    initial: np.ndarray,
    ever_active: np.ndarray,
    final: np.ndarray,
    path: str | PathLike[str],
    title: str = "",
    shape: tuple[int, int] | None = None,
) -> None:
    """
    Draw which blocks of one tensor were active: at the start, at any time, and at the end.

    Args:
        initial (`np.ndarray` of shape `(block_rows, block_columns)`):
            Boolean, the first topology.
        ever_active (`np.ndarray` of shape `(block_rows, block_columns)`):
            Boolean, the blocks that were active at any time; its density is the tensor's DOF coverage.
        final (`np.ndarray` of shape `(block_rows, block_columns)`):
            Boolean, the last topology.
        path (`str` or `PathLike`):
            File to write; its suffix chooses the format. Missing folders are made.
        title (`str`, *optional*, defaults to `""`):
            Title of the picture, usually the name of the tensor.
        shape (`tuple[int, int]`, *optional*):
            `(out_features, in_features)` of the tensor; the axes then count features instead of blocks.

    Raises:
        ValueError: if the maps are not Boolean matrices of one shape.
    """
    names = ("initial", "ever active", "final")
    maps = [np.asarray(block_map) for block_map in (initial, ever_active, final)]
    for name, block_map in zip(names, maps, strict=True):
        if (
            block_map.dtype != np.bool_
            or block_map.ndim != 2
            or not block_map.size
            or block_map.shape != maps[0].shape
        ):
            raise ValueError(
                "A block map must be a Boolean matrix [block_rows, block_columns], the same size for all three. "
                f"Got {block_map.dtype} {list(block_map.shape)} for the {name} one"
                f" and {list(maps[0].shape)} for the initial one. "
                "Mark the blocks of the block index in `np.zeros((block_rows, block_columns), dtype=bool)`."
            )

    height, width = shape or maps[0].shape
    factor = -(-max(maps[0].shape) // MAX_CELLS)
    cells = [mean_of_squares(block_map, factor) for block_map in maps]
    # Means of a sparse map are all pale: the scale ends where the values do.
    top = 1.0 if factor == 1 else max(cell.max() for cell in cells) or 1.0

    # Wide tensors lie one above the other, others side by side; sizes in inches.
    stacked = width > 1.6 * height
    side = 5.0 if stacked else min(3.1, max(1.5, 5.5 * width / height))  # of a panel, along the block columns
    bar = 0.0 if factor == 1 else 0.9
    size = (side + 0.7 + bar, 3 * (side * height / width + 0.35) + 0.7)
    if not stacked:
        size = (3 * (side + 0.1) + 0.8 + bar, side * height / width + 1.0)
    # A cell gets at least one pixel, or nearest interpolation would skip some.
    dpi = max(220.0, 1.1 * cells[0].shape[1] / side)
    grid = (3, 1) if stacked else (1, 3)
    with picture(path, *grid, size, title, dpi=dpi, sharex=True, sharey=True) as (figure, panels):
        for name, block_map, cell, axes in zip(names, maps, cells, panels, strict=True):
            extent = (0, width, height, 0)
            image = axes.imshow(cell, block_colours(), vmin=0, vmax=top, interpolation="nearest", extent=extent)
            axes.set_title(f"{name}: {100 * block_map.mean():.1f} %")
            axes.grid(False)
            axes.spines[["top", "right"]].set_visible(True)
            axes.set_xlabel("input feature" if shape else "block column")
            axes.set_ylabel("output feature" if shape else "block row")
            axes.label_outer()
        if factor > 1:
            label = f"share active of {factor} x {factor} blocks"
            figure.colorbar(image, ax=list(panels), label=label, shrink=0.7, aspect=30)


def plot_layer_maps(
    block_maps: Mapping[str, np.ndarray], path: str | PathLike[str], title: str = "", columns: int = 6
) -> None:
    """
    Draw which blocks of each layer of a saved model are active, a panel a layer.

    Args:
        block_maps (`Mapping[str, np.ndarray]`):
            Name of each layer -> Boolean matrix `(block_rows, block_columns)`, such as `layout.to_mask().numpy()` of
            the layers of [`inspect_checkpoint`].
        path (`str` or `PathLike`):
            File to write; its suffix chooses the format. Missing folders are made.
        title (`str`, *optional*, defaults to `""`):
            Title of the picture.
        columns (`int`, *optional*, defaults to 6):
            Panels in a row: a BERT has six matrices in each layer.

    Raises:
        ValueError: if there is no layer.
    """
    if not block_maps:
        raise ValueError("`block_maps` must hold at least one layer. Got none: a dense model has no block map.")
    factor = -(-max(max(block_map.shape) for block_map in block_maps.values()) // MAX_PANEL_CELLS)
    cells = {name: mean_of_squares(block_map, factor) for name, block_map in block_maps.items()}
    top = 1.0 if factor == 1 else max(cell.max() for cell in cells.values())
    columns = min(columns, len(cells))
    rows = -(-len(cells) // columns)
    shared = commonprefix(list(cells)).rpartition(".")[0] if len(cells) > 1 else ""
    # All panels in one pair of axes: to arrange many by constraints would take a minute.
    size = (1.5 * columns + 1.0, 1.6 * rows + 0.5)  # inches
    with picture(path, 1, 1, size, title) as (figure, axes):
        for place, (name, cell) in enumerate(cells.items()):
            top_side, left = (step * side for step, side in zip((1.2, 1.1), divmod(place, columns), strict=True))
            height, width = (side / max(cell.shape) for side in cell.shape)
            extent = (left, left + width, top_side + height, top_side)
            image = axes.imshow(cell, block_colours(), vmin=0, vmax=top, interpolation="nearest", extent=extent)
            label = f"{name.removeprefix(f'{shared}.')}  {100 * block_maps[name].mean():.1f} %"
            axes.text(left, top_side - 0.03, label, fontsize=5)
        axes.set_axis_off()
        axes.set_xlim(0, 1.1 * columns)
        axes.set_ylim(1.2 * rows, -0.2)
        if factor > 1:
            figure.colorbar(
                image, ax=axes, label=f"share active of {factor} x {factor} blocks", shrink=min(0.9, 3 / rows)
            )

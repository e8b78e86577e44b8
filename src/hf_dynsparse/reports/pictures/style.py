"""Colours, lines and fonts that all pictures share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure


# Okabe and Ito's colours, which all common forms of colour vision keep apart, less the yellow: too pale for a line.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
DASHES = ("-", "--", ":", "-.")
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.edgecolor": "#808080",
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.8,
    "lines.markersize": 3.5,
    "xtick.color": "#404040",
    "ytick.color": "#404040",
    "figure.titlesize": 11,
}


def block_colours() -> Colormap:
    """From no active block to all, for maps."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("blocks", ["#F4F4F1", COLOURS[0], "#00304D"])


def label_ends(axes: Axes) -> None:
    """Write each line's name beside its last point, after a sample of it, moved apart where two would touch."""
    low, high = axes.get_ylim()
    ends = []
    for line in axes.get_lines():
        values = np.asarray(line.get_ydata(), dtype=float)
        values = values[np.isfinite(values)]
        if len(values):
            ends.append((float(np.clip((values[-1] - low) / (high - low), 0, 1)), line))
    ends.sort(key=lambda end: end[0])

    height = 72 * axes.get_window_extent().height / axes.figure.dpi  # points
    gap = 1.25 * STYLE["font.size"] / height
    heights = [place for place, _ in ends]
    for above in range(1, len(heights)):
        heights[above] = max(heights[above], heights[above - 1] + gap)
    ceiling = 1.0
    for below in reversed(range(len(heights))):
        heights[below] = min(heights[below], ceiling)
        ceiling = heights[below] - gap
    for place, (_, line) in zip(heights, ends, strict=True):
        sample: dict[str, Any] = {
            "color": line.get_color(),
            "linestyle": line.get_linestyle(),
            "linewidth": line.get_linewidth(),
        }
        axes.plot([1.01, 1.045], [place, place], **sample, transform=axes.transAxes, clip_on=False)
        axes.text(1.055, place, str(line.get_label()), transform=axes.transAxes, verticalalignment="center")


@contextmanager
def picture(
    path: str | PathLike[str],
    rows: int,
    columns: int,
    size: tuple[float, float],
    title: str,
    dpi: float = 220.0,
    **layout: Any,
) -> Iterator[tuple[Figure, Any]]:
    """A figure in the house style and its panels; written to `path` when the block ends. Needs no display."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "Pictures are drawn with matplotlib, which could not be imported. Run `pip install hf_dynsparse[plots]`."
        ) from error

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        if title:
            figure.suptitle(title)
        yield figure, figure.subplots(rows, columns, **layout)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=dpi)

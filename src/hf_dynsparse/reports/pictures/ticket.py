"""A picture of a ticket: which heads stay, how many neurons, and how the search went. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np

from .style import COLOURS, picture


if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_ticket(ticket: Mapping[str, Any], path: str | PathLike[str], title: str = "") -> None:
    """
    Draw a ticket: the heads of each layer, by their gates and crossed out where they go; the neurons that stay in each
    layer; and of a search, how far its tickets were from the ones before them.

    Args:
        ticket (`Mapping[str, Any]`):
            Content of a `ticket.json`, see [`Ticket`]; `gates` and `draws` are drawn where present.
        path (`str` or `PathLike`):
            File to write; its suffix chooses the format. Missing folders are made.
        title (`str`, *optional*, defaults to `""`):
            Title of the picture.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    draws = [draw for draw in ticket.get("draws", ()) if "distance" in draw]
    panels = 3 if draws else 2
    with picture(path, 1, panels, (3.4 * panels, 3.2), title) as (figure, axes):
        image = _draw_heads(axes[0], ticket)
        if "gates" in ticket:
            figure.colorbar(image, ax=axes[0], label="|gate|", shrink=0.8)
        _draw_neurons(axes[1], ticket)
        if draws:
            for name, colour in (("head_distance", COLOURS[0]), ("neuron_distance", COLOURS[1])):
                label = name.replace("_distance", "s")
                axes[2].plot(
                    [d["step"] for d in draws], [d[name] for d in draws], label=label, color=colour, marker="o"
                )
            axes[2].set_title("distance to the tickets before")
            axes[2].set_xlabel("step")
            axes[2].set_ylim(bottom=0)
            axes[2].legend(frameon=False)


def _draw_heads(axes: Axes, ticket: Mapping[str, Any]) -> Any:
    sizes, kept = ticket["num_heads"], ticket["heads"]
    cells = np.full((len(sizes), max(sizes)), np.nan)
    for row, size in enumerate(sizes):
        cells[row, :size] = (
            np.abs(ticket["gates"]["heads"][row]) if "gates" in ticket else np.isin(range(size), kept[row])
        )
        gone = sorted(set(range(size)) - set(kept[row]))
        axes.plot(gone, [row] * len(gone), linestyle="none", marker="x", markersize=5, color="#000000")
    image = axes.imshow(cells, "Blues", aspect="auto", interpolation="nearest")
    axes.set_title(f"heads: {sum(map(len, kept))} of {sum(sizes)} stay")
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    axes.grid(False)
    return image


def _draw_neurons(axes: Axes, ticket: Mapping[str, Any]) -> None:
    sizes, kept = ticket["num_neurons"], [len(layer) for layer in ticket["neurons"]]
    layers = np.arange(len(sizes))
    axes.barh(layers, sizes, color="#E4E4E4")
    axes.barh(layers, kept, color=COLOURS[0])
    axes.invert_yaxis()
    axes.set_title(f"neurons: {sum(kept):,} of {sum(sizes):,} stay")
    axes.set_xlabel("intermediate neurons")
    axes.set_ylabel("layer")

"""What the pictures of a study have in common: colours, markers, numbers of variants, and crosses on the plateau."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from os import PathLike
from typing import TYPE_CHECKING, Any

from study.analysis import Configuration, Series
from study.words import less, order, words

from hf_dynsparse.reports.pictures.style import COLOURS, picture


if TYPE_CHECKING:
    from matplotlib.axes import Axes


MARKERS = {"static": "s", "dynsparse": "o", "random": "o"}
OTHER_MARKERS = "^vDP*Xd"
PLATEAU_WORDS = "on the plateau of word frequencies"


@contextmanager
def grid_of(path: str | PathLike[str], count: int, height: float) -> Iterator[list[Axes]]:
    """A picture of `count` panels, three in a row, each `height` inches high."""
    columns = min(3, count)
    rows = -(-count // columns)
    with picture(path, rows, columns, (4.6 * columns, height * rows), "", squeeze=False) as (_, grid):
        panels = list(grid.flat)
        for axes in panels[count:]:
            axes.set_axis_off()
        yield panels[:count]


def add_legend(axes: Axes) -> None:
    """Name the lines, if they have names."""
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False, fontsize=6.5)


def given_beside(line: Iterable[Configuration]) -> str:
    """What the plan gives the members of a line beside that which makes them one."""
    plans = dict.fromkeys(words(less(each.plan, "size", "preset", *Series._fields).items()) for each in line)
    return "".join(f", {given}" for given in plans if given)


def numbered(variants: Iterable[tuple[Configuration, str]]) -> Iterator[tuple[Configuration, int, str]]:
    """Each variant, its number, and what the number means if it is the first to have it: else no name."""
    numbers: dict[str, int] = {}
    for each, apart in variants:
        name = "_" if apart in numbers else apart
        yield each, numbers.setdefault(apart, len(numbers) + 1), name


def plot_number(axes: Axes, point: tuple[list[float], list[float]], number: int, name: str, colour: str) -> None:
    """A dot with a number, which beside the name is the marker in the legend."""
    axes.plot(*point, ".", color=colour, markersize=5)
    place = point[0][0], point[1][0]
    axes.annotate(str(number), place, (-3, -2), ha="right", fontsize=6, textcoords="offset points", color=colour)
    axes.plot([], [], marker=f"${number}$", linestyle="", color="#404040", markersize=5 + len(str(number)), label=name)


def cross_out(axes: Axes, points: Iterable[tuple[Configuration, Any]]) -> None:
    """Mark those of which a run has hardly learnt more than the frequencies of pieces."""
    for each, place in points:
        if each.on_plateau:
            known = any(line.get_label() == PLATEAU_WORDS for line in axes.get_lines())
            name = "_" if known else PLATEAU_WORDS
            axes.plot([place], [each.loss], "x", color="#404040", markersize=7, label=name, zorder=3)


def annotate(axes: Axes, each: Configuration, cost: str, text: str) -> None:
    """Write a few words beside its marker."""
    point = each.mean(cost), each.loss
    beside = axes.annotate(text, point, (4, 3), fontsize=6, textcoords="offset points", color="#404040")
    beside.set_in_layout(False)  # else panels shrink beside a long one


def points_of(line: Iterable[Configuration], cost: str) -> tuple[list[float], list[float]]:
    """Costs and losses."""
    points = [(each.mean(cost), each.loss) for each in line]
    return [cost for cost, _ in points], [loss for _, loss in points]


def spreads_of(line: Iterable[Configuration]) -> list[float]:
    """Standard deviations over seeds, 0 of a single one."""
    return [each.spread or 0.0 for each in line]


def colours_of(names: Iterable[Any]) -> dict[Any, str]:
    """A colour for each name, in the order of numbers and words."""
    return {name: COLOURS[place % len(COLOURS)] for place, name in enumerate(sorted(set(names), key=order))}


def markers_of(names: Iterable[Any]) -> dict[Any, str]:
    """A marker for each name: some have one of their own."""
    others = (name for name in dict.fromkeys(names) if name not in MARKERS)
    return MARKERS | {name: OTHER_MARKERS[place % len(OTHER_MARKERS)] for place, name in enumerate(others)}


def spans_much(costs: Iterable[float]) -> bool:
    """Whether the largest is more than three times the smallest."""
    found = list(costs)
    return min(found) > 0 and max(found) > 3 * min(found)


def is_number(text: Any) -> bool:
    """Whether it is one, or a word for one."""
    try:
        float(text)
    except (TypeError, ValueError):
        return False
    return not isinstance(text, bool)

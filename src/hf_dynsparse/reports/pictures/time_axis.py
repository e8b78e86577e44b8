"""Axes of time: seconds, with ticks in numbers that people read."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from matplotlib.axes import Axes

UNITS = {"s": 1, "min": 60, "h": 3600, "d": 86400}
# Of each unit, up to the next one.
ROUND = {"s": (1, 2, 5, 10, 30), "min": (1, 2, 5, 10, 30), "h": (1, 2, 4, 12), "d": (1, 2, 5, 10, 30, 100)}
MOST = 7  # ticks of an axis


def label_time(axes: Axes) -> None:
    """Put ticks such as 30 s, 5 min and 2 h on an x axis of seconds, linear or logarithmic, that has its limits."""
    low, high = axes.get_xlim()
    ticks = logarithmic_ticks(low, high) if axes.get_xscale() == "log" else linear_ticks(low, high)
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.minorticks_off()


def logarithmic_ticks(low: float, high: float) -> dict[float, str]:
    """
    Seconds -> words of the round times from `low` to `high`; every second, third... of them if there are many.

    Example:
        ```python
        >>> logarithmic_ticks(40, 400)
        {60: "1 min", 120: "2 min", 300: "5 min"}
        ```
    """
    every = {number * UNITS[unit]: f"{number} {unit}" for unit, numbers in ROUND.items() for number in numbers}
    inside = [(seconds, words) for seconds, words in every.items() if low <= seconds <= high]
    return dict(inside[:: math.ceil(len(inside) / MOST) or 1])


def linear_ticks(low: float, high: float) -> dict[float, str]:
    """
    Seconds -> words of the multiples of a round time from `low` to `high`, in the unit of that time.

    Example:
        ```python
        >>> linear_ticks(0, 3000)
        {0: '0', 600: '10 min', 1200: '20 min', 1800: '30 min', 2400: '40 min', 3000: '50 min'}
        ```
    """
    steps = [(number * UNITS[unit], unit) for unit, numbers in ROUND.items() for number in numbers]
    step, unit = next((step for step in steps if (high - low) / step[0] <= MOST), steps[-1])
    multiples = range(math.ceil(low / step), math.floor(high / step) + 1)
    return {step * place: f"{step * place / UNITS[unit]:g} {unit}" if place else "0" for place in multiples}

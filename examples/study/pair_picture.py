"""The picture of what dynamic topologies change, in pairs of a seed."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import Any

import numpy as np
from study.analysis import Configuration
from study.marks import colours_of
from study.pairs import find_pairs

from hf_dynsparse.reports.pictures.style import picture


RESULTS = {"eval_loss": "loss: static - dynamic (nats)", "context_gain": "context gain: dynamic - static (nats)"}
HEADING = "right of 0: dynamic is better\nbars: 95 % interval over seeds; strokes: each seed; hollow: a single one"


def plot_pairs(configurations: Sequence[Configuration], path: str | PathLike[str]) -> bool:
    """
    Differences of loss and of context gain between runs that differ in the method alone, a row for each dynamic
    configuration; those with a run on the plateau are crossed out.
    """
    groups = find_pairs(configurations)
    told = [result for result in RESULTS if any(np.isfinite(each.interval(result).mean) for each in groups)]
    if not told:
        return False
    colours = colours_of(group.dynamic.settings["block_size"] for group in groups)
    size = 2.4 + 4.0 * len(told), 1.3 + 0.32 * len(groups)
    with picture(path, 1, len(told), size, "", sharey=True, squeeze=False) as (figure, (panels,)):
        for axes, result in zip(panels, told, strict=True):
            shown = [0.0]
            axes.axvline(0.0, color="#404040", linewidth=1.2)
            for row, group in enumerate(groups):
                found, differences = group.interval(result), group.differences(result)
                colour = colours[group.dynamic.settings["block_size"]]
                axes.plot(differences, [row] * len(differences), "|", color=colour, markersize=9)
                style: dict[str, Any] = {"color": colour, "markerfacecolor": colour if found.count > 1 else "white"}
                style |= {"linewidth": 1.2, "markersize": 5}
                axes.errorbar(found.mean, row, xerr=found.half, fmt="o", **style)
                if group.on_plateau:
                    axes.plot(found.mean, row, "x", color="#404040", markersize=9)
                # The interval of two seeds is so wide that no other would be seen beside it.
                ends = (found.low, found.high) if found.count > 2 else ()
                shown += [end for end in (*ends, *differences) if end is not None and np.isfinite(end)]
            margin = 0.06 * (max(shown) - min(shown)) or 1.0
            axes.set_xlim(min(shown) - margin, max(shown) + margin)
            axes.set_xlabel(RESULTS[result])
        panels[0].set_yticks(range(len(groups)), [f"{each.common}, {each.differs}" for each in groups], fontsize=7)
        panels[0].set_ylim(len(groups) - 0.5, -0.5)  # the first on top
        crossed = "\ncrossed out: a run on the plateau" if any(group.on_plateau for group in groups) else ""
        figure.suptitle(HEADING + crossed, fontsize=8)
    return True

"""Pictures of a study of many runs, from what `study` found. A picture is drawn only if the study has runs for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from statistics import mode
from typing import TYPE_CHECKING, Any

import numpy as np
from study.analysis import (
    Configuration,
    dense_family,
    learning_rate_rule,
    pareto_front,
    plainest,
    series,
    size_of,
    variations,
)
from study.marks import (
    add_legend,
    annotate,
    colours_of,
    cross_out,
    given_beside,
    grid_of,
    is_number,
    markers_of,
    numbered,
    plot_number,
    points_of,
    spans_much,
    spreads_of,
)
from study.pair_picture import plot_pairs
from study.words import label, less, words

from hf_dynsparse.reports.inspection import inspect_checkpoint
from hf_dynsparse.reports.pictures.layers import plot_layer_maps
from hf_dynsparse.reports.pictures.style import COLOURS, DASHES, picture
from hf_dynsparse.reports.pictures.time_axis import label_time


if TYPE_CHECKING:
    from matplotlib.axes import Axes


COSTS = {"flops": "training FLOPs", "seconds": "time of training"}
EXPLORATION = {"coverage": "DOF coverage at the end", "newborn_share": "newborn share, mean over the run"}
# Settings with a panel of their own, with the words on its axis.
SWEEPS = {
    "block_size": "block size B",
    "sparsity": "sparsity",
    "num_topology_updates": "topology updates n",
    "pruning_ratio": "pruning ratio pr",
    "pruning_schedule": "schedule of the pruning ratio",
    "prune_score": "block score",
    "regrow_rule": "regrow rule",
    "method": "method",
}
LOGARITHMIC = ("block_size", "num_topology_updates")


def draw_study(configurations: Sequence[Configuration], folder: str | PathLike[str]) -> dict[str, str]:
    """
    Draw all pictures that the study has runs for.

    Args:
        configurations (`Sequence[Configuration]`): see [`best_configurations`].
        folder (`str` or `PathLike`): where they are written, as PNG.

    Returns:
        `dict[str, str]`: file name -> what it shows.
    """
    shown = {}
    for name, (draw, caption) in PICTURES.items():
        if draw(configurations, Path(folder, name)):
            shown[name] = caption
    return shown


def plot_pareto(configurations: Sequence[Configuration], path: str | PathLike[str]) -> bool:
    """
    Loss against training FLOPs and against seconds: the dense family as a line, others by method and block size. Where
    a study varies more than sizes, sparsities, methods and blocks, the plainest has the marker, and the others have
    numbers that the legend explains.
    """
    if not dense_family(configurations) or len(configurations) < 2:
        return False
    lines, variants = series(configurations)
    blocks = colours_of(kind.block_size for kind in lines)
    markers = markers_of(kind.method for kind in lines)
    usual = mode(kind.sparsity for kind in lines) if lines else 0.0
    several = len({size_of(each.settings) for line in lines.values() for each in line}) > 1
    with picture(path, 1, 2, (10.4, 4.4), "", sharey=True) as (figure, panels):
        for axes, (cost, axis) in zip(panels, COSTS.items(), strict=True):
            front = pareto_front(dense_family(configurations, cost))
            axes.plot(*zip(*front, strict=True), color="#404040", label="dense family")
            for each in (each for each in configurations if each.is_dense):
                axes.plot(*points_of([each], cost), "k.", markersize=6)
                annotate(axes, each, cost, words(less(each.plan, "method").items()))
            for kind, line in lines.items():
                colour = blocks[kind.block_size]
                style = {"color": colour, "marker": markers[kind.method], "markersize": 5, "linewidth": 0.9}
                style["markerfacecolor"] = "white" if kind.method == "static" else colour
                name = f"{kind.method}, B = {kind.block_size}{given_beside(line)}" if kind.sparsity == usual else None
                axes.errorbar(*points_of(line, cost), spreads_of(line), label=name, capsize=2, **style)
                for each in line:
                    beside = [size_of(each.settings)] if several else []
                    beside += [f"{kind.sparsity:g}"] if kind.sparsity != usual else []
                    annotate(axes, each, cost, " ".join(beside))
            for each, number, name in numbered(variants):
                plot_number(axes, points_of([each], cost), number, name, blocks[each.settings["block_size"]])
            cross_out(axes, [(each, each.mean(cost)) for each in configurations])
            if spans_much(each.mean(cost) for each in configurations):
                axes.set_xscale("log")
                axes.xaxis.set_minor_formatter("")
            if cost == "seconds":
                label_time(axes)
            axes.set_xlabel(axis)
        panels[0].set_ylabel("evaluation loss (nats)")
        heading = (
            f"sparsity {usual:g}; others: beside the marker" if len({kind.sparsity for kind in lines}) > 1 else ""
        )
        panels[0].set_title(heading, fontsize=8)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=7.5)
    return True


def plot_exploration(configurations: Sequence[Configuration], path: str | PathLike[str]) -> bool:
    """Loss against coverage and against newborn share, of one size and sparsity (the paper's figure 5)."""
    groups: dict[Any, list[Configuration]] = {}
    for each in configurations:
        if not each.is_dense and not math.isnan(each.mean("newborn_share")):
            groups.setdefault((size_of(each.settings), each.settings["sparsity"]), []).append(each)
    if not groups:
        return False
    (size, sparsity), chosen = max(groups.items(), key=lambda group: len(group[1]))
    if len(chosen) < 2:
        return False
    colours = colours_of(each.settings["block_size"] for each in chosen)
    markers = markers_of(each.settings["regrow_rule"] for each in chosen)
    with picture(path, 1, 2, (9.6, 3.9), f"{size}, sparsity {sparsity:g}", sharey=True) as (figure, panels):
        labels = set()
        plain, variants = plainest(chosen, "block_size", "regrow_rule")
        for axes, (result, axis) in zip(panels, EXPLORATION.items(), strict=True):
            for each, number, name in numbered(variants):
                colour = colours[each.settings["block_size"]]
                plot_number(axes, ([100 * each.mean(result)], [each.loss]), number, name, colour)
            cross_out(axes, [(each, 100 * each.mean(result)) for each in chosen])
            for each in plain:
                block, rule = each.settings["block_size"], each.settings["regrow_rule"]
                name = f"B={block}, {rule}"
                shown = "_" if name in labels else name
                labels.add(name)
                point = [100 * each.mean(result)], [each.loss]
                axes.plot(*point, markers[rule], color=colours[block], markersize=5, label=shown)
            axes.set_xlabel(f"{axis} (%)")
        panels[0].set_ylabel("evaluation loss (nats)")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=7.5)
    return True


def plot_sweeps(configurations: Sequence[Configuration], path: str | PathLike[str]) -> bool:
    """A panel for each setting that some configurations differ in, in nothing else (the paper's figures 7 and 8)."""
    panels = {key: lines for key in SWEEPS if (lines := variations(configurations, key))}
    if "method" in panels:  # two of them stand beside each other in the first picture
        panels["method"] = {name: line for name, line in panels["method"].items() if len(line) > 2}
    panels = {key: lines for key, lines in panels.items() if lines}
    if not panels:
        return False
    with grid_of(path, len(panels), height=3.4) as grid:
        for axes, (key, lines) in zip(grid, panels.items(), strict=True):
            _sweep(axes, key, lines)
    return True


def _sweep(axes: Axes, key: str, lines: Mapping[str, Sequence[Configuration]]) -> None:
    names = [each.settings[key] for line in lines.values() for each in line]
    numeric = all(is_number(name) for name in names)
    for place, (name, line) in enumerate(lines.items()):
        values = [float(each.settings[key]) if numeric else str(each.settings[key]) for each in line]
        style: dict[str, Any] = {"color": COLOURS[place % len(COLOURS)], "marker": "o", "capsize": 2}
        style["linestyle"] = DASHES[place // len(COLOURS) % len(DASHES)] if numeric else ":"
        axes.errorbar(values, [each.loss for each in line], spreads_of(line), label=name, **style)
        cross_out(axes, zip(line, values, strict=True))
    if numeric and key in LOGARITHMIC:
        ticks = sorted({float(name) for name in names})
        axes.set_xscale("log")
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
    axes.set_xlabel(SWEEPS[key])
    axes.set_ylabel("loss (nats)")
    add_legend(axes)


def plot_learning_rates(configurations: Sequence[Configuration], path: str | PathLike[str]) -> bool:
    """Loss against learning rate; a dotted line where the rule puts the best one, from that of the dense twin."""
    panels: dict[str, list[Configuration]] = {}
    for each in configurations:
        if len(each.sweep) > 1:
            panels.setdefault(size_of(each.settings), []).append(each)
    if not panels:
        return False
    with grid_of(path, len(panels), height=3.6) as grid:
        for axes, (size, swept) in zip(grid, panels.items(), strict=True):
            for place, (each, name) in enumerate(zip(swept, label(swept, ("size", "preset")), strict=True)):
                style: dict[str, Any] = {
                    "color": COLOURS[place % len(COLOURS)],
                    "linestyle": DASHES[place // len(COLOURS) % len(DASHES)],
                }
                axes.plot(*zip(*each.sweep.items(), strict=True), marker="o", label=name, **style)
            for rule in {learning_rate_rule(each, configurations) for each in swept}:
                if rule is not None:
                    axes.axvline(rule, color="#808080", linestyle=":", linewidth=1)
            axes.set_title(size)
            axes.set_xscale("log")
            rates = sorted({rate for each in swept for rate in each.sweep})
            axes.set_xticks(rates, [f"{rate:g}" for rate in rates], fontsize=7)
            axes.minorticks_off()
            axes.set_xlabel("peak learning rate (dotted: by the rule)")
            axes.set_ylabel("evaluation loss (nats)")
            add_legend(axes)
    return True


def plot_patterns(configurations: Sequence[Configuration], path: str | PathLike[str]) -> bool:
    """
    The final topology of one layer after random and after gradient regrowth (the paper's figure 11): the layer whose
    block columns the latter filled least evenly.
    """
    groups: dict[tuple[str, ...], dict[str, Configuration]] = {}
    for each in sorted(configurations, key=lambda each: len(each.plan)):
        if rule := each.settings.get("regrow_rule"):
            alike = size_of(each.settings), str(each.settings["sparsity"]), each.settings["block_size"]
            groups.setdefault(alike, {}).setdefault(rule, each)
    chosen = [group for group in groups.values() if {"random", "gradient"} <= group.keys()]
    if not chosen:
        return False
    maps = {rule: _block_maps(each.runs[0].folder) for rule, each in chosen[0].items()}
    unevenness = {name: block_map.mean(0).std() for name, block_map in maps["gradient"].items()}
    layer = max(unevenness, key=lambda name: unevenness[name])
    plot_layer_maps({rule: found[layer] for rule, found in maps.items()}, path, title=layer, columns=4)
    return True


def _block_maps(folder: Path) -> dict[str, np.ndarray]:
    return {layer.name: layer.layout.to_mask().numpy() for layer in inspect_checkpoint(folder).layers}


def plot_untrained(configurations: Sequence[Configuration], path: str | PathLike[str]) -> bool:
    """Inactive weights zero, against constant at their initial values (the paper's figure 1)."""
    lines: dict[str, list[Configuration]] = {"zeroed": [], "untrained": []}
    sizes = {size_of(each.settings) for each in configurations if each.settings.get("untrained_rest")}
    for each in configurations:
        if each.settings["method"] == "static" and size_of(each.settings) in sizes:
            lines["untrained" if each.settings.get("untrained_rest") else "zeroed"].append(each)
    if not all(lines.values()) or sum(map(len, lines.values())) < 3:
        return False
    blocks = {each.settings["block_size"] for each in lines["untrained"]}
    with picture(path, 1, 1, (5.6, 3.8), "") as (_, axes):
        for place, (name, line) in enumerate(lines.items()):
            matching = [each for each in line if each.settings["block_size"] in blocks]
            plain, _ = plainest(matching, "size", "preset", "sparsity", "block_size")
            chosen = sorted(plain, key=lambda each: each.settings["sparsity"])
            spreads = spreads_of(chosen)
            points = [each.settings["sparsity"] for each in chosen], [each.loss for each in chosen]
            axes.errorbar(*points, spreads, label=name, color=COLOURS[place], marker="o", capsize=2)
        axes.set_xlabel("share of weights that do not train")
        axes.set_ylabel("evaluation loss (nats)")
        axes.legend(frameon=False)
    return True


PICTURES: dict[str, tuple[Callable[[Sequence[Configuration], Path], bool], str]] = {
    "pareto.png": (plot_pareto, "Loss against training FLOPs and time; bars: standard deviation over seeds"),
    "pairs.png": (plot_pairs, "What a dynamic topology changes, in pairs of a seed that differ in the method alone"),
    "sweeps.png": (plot_sweeps, "Loss against one setting, all others equal; bars: standard deviation over seeds"),
    "exploration.png": (plot_exploration, "Loss against DOF coverage and newborn share"),
    "patterns.png": (
        plot_patterns,
        "Active blocks of one layer at the end, by regrow rule: that which gradient regrowth filled least evenly",
    ),
    "learning_rate.png": (plot_learning_rates, "Learning rates, and where the rule puts the best one"),
    "untrained.png": (plot_untrained, "Weights that do not train: zero, or constant at their initial values"),
}

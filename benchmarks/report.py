#!/usr/bin/env python
"""
Turn the JSON of the benchmarks into markdown tables, and that of `bench_linear.py` into a picture as well: the time of
a useful FLOP, relative to dense, against density. Each input becomes one file of the same name.

    python benchmarks/report.py linear.json step.json inference.json --output_dir report
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _cli import Row
from _machine import one_line
from _table import COLUMNS, heading, line

from hf_dynsparse.ops import BACKENDS
from hf_dynsparse.reports.pictures.style import COLOURS, DASHES, STYLE
from hf_dynsparse.reports.tables import markdown_table


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="what the benchmarks wrote with --json")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the tables and pictures")
    args = parser.parse_args(argv)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for file in args.files:
        content = json.loads(file.read_text())
        if content.get("benchmark") not in COLUMNS:
            parser.error(f"a file must hold the rows of {', '.join(COLUMNS)}. Got {file}. Write it with --json.")
        picture = args.output_dir / f"{file.stem}.png"
        if content["benchmark"] == "bench_linear":
            table = layer_table(content["rows"]) + f"\n\n![Time of a useful FLOP against density]({picture.name})"
            plot_costs(content["rows"], picture)
        else:
            columns = COLUMNS[content["benchmark"]]
            table = "\n".join([heading(columns), *(line(row, columns) for row in content["rows"])])
        if content["benchmark"] == "bench_calibrated" and content["rows"][0]["score"] is not None:
            table += f"\n\n![Score against bytes and milliseconds]({picture.name})"
            plot_scores(content["rows"], picture)
        machine = content["machine"]
        caption = f"{one_line(machine)}; {machine['clock']}{'; freed memory kept' if keeps(content) else ''}"
        (args.output_dir / f"{file.stem}.md").write_text(f"```\n$ {content['command']}\n```\n\n{caption}\n\n{table}\n")


def keeps(content: dict[str, Any]) -> bool:
    """Whether the allocator kept freed memory."""
    return any(row["keep_freed_memory"] for row in content["rows"])


def arm_of(row: Row) -> str:
    """The column of a row: a block size of ours, or what it is compared with."""
    ours = set(BACKENDS)
    return f"B={row['block_size']}" if ours & set(row["backend"].replace("/", " ").split()) else row["backend"]


def layer_table(rows: list[Row]) -> str:
    """A line per tokens, shape and sparsity, a column per arm: time over dense, forward / backward / **total**."""
    arms = list(dict.fromkeys(map(arm_of, rows)))
    places: dict[tuple[int, int, int, float], dict[str, str]] = {}
    for row in rows:
        place = row["tokens"], row["out"], row["in"], row["sparsity"]
        places.setdefault(place, {})[arm_of(row)] = ratios(row)
    lines = (
        [tokens, f"{out}x{inp}", f"{sparsity:g}", *(cells.get(arm, "-") for arm in arms)]
        for (tokens, out, inp, sparsity), cells in places.items()
    )
    return markdown_table(["tokens", "out x in", "s", *arms], lines)


def ratios(row: Row) -> str:
    """`.11 / .12 / **.12**`, or the forward ratio alone."""
    forward = f"{row['forward_ratio']:.3f}"
    if row["total_ratio"] is None:
        return forward
    return f"{forward} / {row['backward_ratio']:.3f} / **{row['total_ratio']:.3f}**"


def plot_costs(rows: list[Row], path: Path) -> None:
    """Median over shapes and tokens of time / dense time / density, with the line where sparse and dense are even."""
    import matplotlib
    from matplotlib.figure import Figure

    sparse = [row for row in rows if row["block_size"] is not None]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.6, 4.0), layout="constrained")
        axes = figure.subplots()
        for place, arm in enumerate(dict.fromkeys(map(arm_of, sparse))):
            costs: dict[float, list[float]] = {}
            for row in sparse:
                if arm_of(row) == arm:
                    density = 1 - row["sparsity"]
                    ratio = row["forward_ratio"] if row["total_ratio"] is None else row["total_ratio"]
                    costs.setdefault(density, []).append(ratio / density)
            densities = sorted(costs)
            style = {"color": COLOURS[place % len(COLOURS)], "linestyle": DASHES[place // len(COLOURS) % len(DASHES)]}
            medians = [statistics.median(costs[density]) for density in densities]
            axes.plot(densities, medians, marker="o", label=arm, **style)
        limits = [min(1 - row["sparsity"] for row in sparse), 1.0]
        axes.plot(
            limits, [1 / density for density in limits], color="#707070", linewidth=1.2, label="as long as dense"
        )
        axes.axhline(1.0, color="#707070", linewidth=1.2, linestyle=":", label="a FLOP costs what it does in dense")
        axes.set(xscale="log", yscale="log", xlabel="density", ylabel="time of a useful FLOP / dense")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:g}")
        axes.legend(frameon=False)
        figure.savefig(path, dpi=220)


def plot_scores(rows: list[Row], path: Path) -> None:
    """What pruned encoders are worth, against bytes and time of a sentence: a line a block size and method."""
    import matplotlib
    from matplotlib.figure import Figure

    dense, *pruned = rows
    sizes, methods = (list(dict.fromkeys(row[name] for row in pruned)) for name in ("block_size", "method"))
    costs = {"encoder_bytes": ("encoder, MB", 1e-6), "sentence_seconds": ("ms a sentence", 1e3)}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.0, 3.6), layout="constrained")
        for axes, (cost, (name, scale)) in zip(figure.subplots(1, 2, sharey=True), costs.items(), strict=True):
            for size, method in dict.fromkeys((row["block_size"], row["method"]) for row in pruned):
                found = [row for row in pruned if (row["block_size"], row["method"]) == (size, method)]
                points = sorted((row["sparsity"], scale * row[cost], row["score"]) for row in found)
                colour = COLOURS[sizes.index(size) % len(COLOURS)]
                style = {"color": colour, "linestyle": DASHES[methods[::-1].index(method) % len(DASHES)]}
                label = f"blocks of {size}, {method}"
                axes.plot(*zip(*(point[1:] for point in points), strict=True), marker="o", label=label, **style)
                for sparsity, *point in points:
                    offset = {"xytext": (4, -9), "textcoords": "offset points", "fontsize": 6.5}
                    axes.annotate(f"{sparsity:.0%}", point, color=colour, **offset)
            axes.plot(scale * dense[cost], dense["score"], "*", color="#000000", markersize=9, label="dense")
            axes.set(xlabel=name, xlim=(0, None))
        figure.axes[0].set(ylabel="Spearman x 100 on STS-B")
        figure.legend(*figure.axes[0].get_legend_handles_labels(), frameon=False, loc="outside right upper")
        figure.savefig(path, dpi=220)


if __name__ == "__main__":
    main()

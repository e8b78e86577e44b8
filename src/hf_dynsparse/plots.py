"""Pictures of a finished run, drawn from saved metrics and block maps, never from a live model. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from os.path import commonprefix
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .topology_frames import mean_of_squares


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
MAX_CELLS = 1024  # per side of a block map; beyond, a cell shows the mean of several blocks
MAX_PANEL_CELLS = 192  # the same where a panel shows one of many layers
LOG_RATIO = 10.0  # runs whose total FLOPs differ by more share a logarithmic axis


def plot_training(log_history: Sequence[Mapping[str, Any]], path: str | PathLike[str], title: str = "") -> None:
    """
    Draw one run against its training FLOPs: loss above, exploration of the topology below (Section 6). A run without
    sparse layers, the dense baseline, logs no coverage and gets the upper panel alone.

    Args:
        log_history (`Sequence[Mapping[str, Any]]`):
            The trainer's log: `trainer.state.log_history`, or the list of that name in `trainer_state.json`. Entries
            with `loss` are training, with `eval_loss` evaluation; `dynsparse/coverage`, `dynsparse/newborn_share` and
            `dynsparse/pruning_ratio` are drawn where present. An entry without `dynsparse/flops` is placed by its
            `step`.
        path (`str` or `PathLike`):
            File to write; its suffix chooses the format. Missing folders are made.
        title (`str`, *optional*, defaults to `""`):
            Title of the picture.

    Raises:
        ValueError: if the log holds no loss or no FLOPs.
    """
    _require_keys(log_history, "loss", "eval_loss")
    _require_keys(log_history, "dynsparse/flops")

    all_steps, _ = _series(log_history, "step")
    scale, unit = _flops_unit([_flops_of(log_history, all_steps)])

    def draw(axes: Axes, key: str, label: str, color: str, factor: float = 1.0, **style: Any) -> None:
        steps, values = _series(log_history, key)
        if len(steps):
            axes.plot(_flops_of(log_history, steps) / scale, factor * values, label=label, color=color, **style)

    explores = any("dynsparse/coverage" in entry for entry in log_history)
    layout: dict[str, Any] = {"sharex": True, "squeeze": False, "height_ratios": (3, 2) if explores else (1,)}
    with _picture(path, 1 + explores, 1, (6.6, 5.2 if explores else 3.4), title, **layout) as (_, panels):
        upper, lower = panels[0, 0], panels[-1, 0]
        draw(upper, "loss", "training", COLOURS[4], linewidth=1.2)
        draw(upper, "eval_loss", "evaluation", COLOURS[0], marker="o")
        upper.set_ylabel("loss (nats)")
        _label_ends(upper)
        if explores:
            draw(lower, "dynsparse/coverage", "DOF coverage", COLOURS[2], 100)
            draw(lower, "dynsparse/newborn_share", "newborn share", COLOURS[1], 100)
            draw(lower, "dynsparse/pruning_ratio", "pruning ratio", "#707070", 100, linestyle="--", linewidth=1.2)
            lower.set_ylabel("share (%)")
            lower.set_ylim(-3, 103)
            _label_ends(lower)
        lower.set_xlabel(f"training FLOPs{unit}")
        lower.set_xlim(left=0)


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
    with _picture(path, *grid, size, title, dpi=dpi, sharex=True, sharey=True) as (figure, panels):
        for name, block_map, cell, axes in zip(names, maps, cells, panels, strict=True):
            extent = (0, width, height, 0)
            image = axes.imshow(cell, _block_colours(), vmin=0, vmax=top, interpolation="nearest", extent=extent)
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
    with _picture(path, 1, 1, size, title) as (figure, axes):
        for place, (name, cell) in enumerate(cells.items()):
            top_side, left = (step * side for step, side in zip((1.2, 1.1), divmod(place, columns), strict=True))
            height, width = (side / max(cell.shape) for side in cell.shape)
            extent = (left, left + width, top_side + height, top_side)
            image = axes.imshow(cell, _block_colours(), vmin=0, vmax=top, interpolation="nearest", extent=extent)
            label = f"{name.removeprefix(f'{shared}.')}  {100 * block_maps[name].mean():.1f} %"
            axes.text(left, top_side - 0.03, label, fontsize=5)
        axes.set_axis_off()
        axes.set_xlim(0, 1.1 * columns)
        axes.set_ylim(1.2 * rows, -0.2)
        if factor > 1:
            figure.colorbar(
                image, ax=axes, label=f"share active of {factor} x {factor} blocks", shrink=min(0.9, 3 / rows)
            )


def plot_comparison(
    runs: Mapping[str, Sequence[Mapping[str, Any]]], path: str | PathLike[str], title: str = ""
) -> None:
    """
    Draw the evaluation loss of several runs, against training FLOPs (what it cost) and against the step.

    Args:
        runs (`Mapping[str, Sequence[Mapping[str, Any]]]`):
            Name of each run -> its log, as for [`plot_training`].
        path (`str` or `PathLike`):
            File to write; its suffix chooses the format. Missing folders are made.
        title (`str`, *optional*, defaults to `""`):
            Title of the picture.

    Raises:
        ValueError: if there is no run, or a run without evaluation or FLOPs.
    """
    if not runs:
        raise ValueError("`runs` must name at least one run. Got none. Pass `{'static': log_history, ...}`.")
    curves = {}
    for name, log_history in runs.items():
        _require_keys(log_history, "eval_loss", run=name)
        _require_keys(log_history, "dynsparse/flops", run=name)
        steps, losses = _series(log_history, "eval_loss")
        curves[name] = steps, _flops_of(log_history, steps), losses

    # FLOPs are positive but at step 0, which a logarithmic axis cannot show.
    totals = [flops[-1] for _, flops, _ in curves.values()]
    logarithmic = min(totals) > 0 and max(totals) / min(totals) > LOG_RATIO
    scale, unit = (1.0, "") if logarithmic else _flops_unit([flops for _, flops, _ in curves.values()])

    with _picture(path, 1, 2, (9.6, 3.8), title, sharey=True) as (_, (left, right)):
        for place, (name, (steps, flops, losses)) in enumerate(curves.items()):
            colour, dashes = COLOURS[place % len(COLOURS)], DASHES[place // len(COLOURS) % len(DASHES)]
            for axes, costs in ((left, flops / scale), (right, steps)):
                axes.plot(costs, losses, label=name, color=colour, linestyle=dashes, marker="o")
        left.set_ylabel("evaluation loss (nats)")
        left.set_xlabel(f"training FLOPs{unit}")
        right.set_xlabel("step")
        right.set_xlim(left=0)
        if logarithmic:
            left.set_xscale("log")
        else:
            left.set_xlim(left=0)
        _label_ends(right)


def plot_sparsity_sweep(
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], path: str | PathLike[str], title: str = ""
) -> None:
    """
    Draw scores against sparsity, a panel a task. Several scores at one sparsity (seeds) become their mean, with a bar
    from the lowest to the highest; a line whose points all lie at sparsity 0 becomes a horizontal one.

    Args:
        panels (`Mapping[str, Mapping[str, Sequence[tuple[float, float]]]]`):
            Task -> name of the line -> `(sparsity, score)`. A name that ends in `", teacher"` is dashed, in the
            colour of the line without.
        path (`str` or `PathLike`):
            File to write; its suffix chooses the format. Missing folders are made.
        title (`str`, *optional*, defaults to `""`):
            Title of the picture.

    Raises:
        ValueError: if there is nothing to draw.
    """
    if not any(line for lines in panels.values() for line in lines.values()):
        raise ValueError("`panels` must hold at least one score. Got none. Finish a run first.")
    names = list(dict.fromkeys(name.removesuffix(", teacher") for lines in panels.values() for name in lines))
    with _picture(path, 1, len(panels), (4.6 * len(panels), 3.8), title, squeeze=False) as (_, grid):
        for axes, (task, lines) in zip(grid[0], panels.items(), strict=True):
            for name, points in lines.items():
                colour = COLOURS[names.index(name.removesuffix(", teacher")) % len(COLOURS)]
                dashes = "--" if name.endswith(", teacher") else "-"
                levels = sorted({sparsity for sparsity, _ in points})
                scores = [[score for sparsity, score in points if sparsity == level] for level in levels]
                means = [float(np.mean(found)) for found in scores]
                if levels == [0.0]:
                    axes.axhline(means[0], label=name, color="#808080", linestyle=":")
                    continue
                bars = [[mean - min(s) for mean, s in zip(means, scores, strict=True)]]
                bars.append([max(s) - mean for mean, s in zip(means, scores, strict=True)])
                axes.errorbar(levels, means, bars, label=name, color=colour, linestyle=dashes, marker="o", capsize=2)
            axes.set_title(task)
            axes.set_xlabel("sparsity")
        grid[0][0].set_ylabel("score")
        grid[0][-1].legend(frameon=False)


def _series(log_history: Sequence[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the entries that hold `key`, in the order of the steps."""
    points = sorted((entry["step"], entry[key]) for entry in log_history if key in entry)
    steps, values = zip(*points, strict=True) if points else ((), ())
    return np.asarray(steps, dtype=float), np.asarray(values, dtype=float)


def _flops_of(log_history: Sequence[Mapping[str, Any]], steps: np.ndarray) -> np.ndarray:
    """Training FLOPs done by `steps`: linear between the logged ones, which start from nothing at step 0."""
    known_steps, known_flops = _series(log_history, "dynsparse/flops")
    latest = np.append(np.diff(known_steps) > 0, True)  # of several entries of one step
    known_steps, known_flops = known_steps[latest], known_flops[latest]
    if known_steps[0] > 0:
        known_steps, known_flops = np.append(0.0, known_steps), np.append(0.0, known_flops)
    flops = np.interp(steps, known_steps, known_flops)
    if len(known_steps) > 1:  # the last evaluation often comes after the last log
        slope = (known_flops[-1] - known_flops[-2]) / (known_steps[-1] - known_steps[-2])
        flops += slope * np.clip(steps - known_steps[-1], 0.0, None)
    return flops


def _require_keys(log_history: Sequence[Mapping[str, Any]], *keys: str, run: str = "") -> None:
    """Raise unless some entry holds one of `keys`."""
    if any(key in entry for entry in log_history for key in keys):
        return
    wanted = " or ".join(f"`{key}`" for key in keys)
    found = ", ".join(sorted({key for entry in log_history for key in entry})) or "none"
    raise ValueError(
        f"The log history{f' of run {run!r}' if run else ''} must hold at least one entry with {wanted}. "
        f"Got {len(log_history)} entries with the keys: {found}. "
        "Pass `trainer.state.log_history` of a `DynSparseTrainer` that has logged"
        f"{' and evaluated' if 'eval_loss' in keys else ''}."
    )


def _flops_unit(series: Iterable[np.ndarray]) -> tuple[float, str]:
    """Divisor and label, a power of a thousand, that bring the largest value of all series between 1 and 1000."""
    largest = max((values.max() for values in series if len(values)), default=0.0)
    exponent = 3 * int(np.log10(largest) // 3) if largest >= 1 else 0
    return (10.0**exponent, rf" ($\times 10^{{{exponent}}}$)") if exponent else (1.0, "")


def _block_colours() -> Colormap:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("blocks", ["#F4F4F1", COLOURS[0], "#00304D"])


def _label_ends(axes: Axes) -> None:
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
def _picture(
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

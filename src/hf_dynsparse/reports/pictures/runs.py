"""Pictures of a finished run, drawn from saved metrics and block maps, never from a live model. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np

from ..facts import PLATEAU
from .style import COLOURS, DASHES, label_ends, picture
from .time_axis import label_time


if TYPE_CHECKING:
    from matplotlib.axes import Axes

LOG_RATIO = 10.0  # runs whose total FLOPs differ by more share a logarithmic axis


def plot_training(log_history: Sequence[Mapping[str, Any]], path: str | PathLike[str], title: str = "") -> None:
    """
    Draw one run against its training FLOPs: loss above, then context gain with the end of the plateau of word
    frequencies, and exploration of the topology below (Section 6). What a run does not log has no panel: a dense
    baseline has no coverage.

    Args:
        log_history (`Sequence[Mapping[str, Any]]`):
            The trainer's log: `trainer.state.log_history`, or the list of that name in `trainer_state.json`. Entries
            with `loss` are training, with `eval_loss` evaluation; `eval_context_gain`, `dynsparse/coverage`,
            `dynsparse/newborn_share` and `dynsparse/pruning_ratio` are drawn where present. An entry without
            `dynsparse/flops` is placed by its `step`.
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

    gains, explores = (
        any(key in entry for entry in log_history) for key in ("eval_context_gain", "dynsparse/coverage")
    )
    rows = 1 + gains + explores
    layout: dict[str, Any] = {"sharex": True, "squeeze": False, "height_ratios": (3, 2, 2)[:rows]}
    with picture(path, rows, 1, (6.6, 1.6 + 1.8 * rows), title, **layout) as (_, panels):
        upper, lower = panels[0, 0], panels[-1, 0]
        draw(upper, "loss", "training", COLOURS[4], linewidth=1.2)
        draw(upper, "eval_loss", "evaluation", COLOURS[0], marker="o")
        upper.set_ylabel("loss (nats)")
        label_ends(upper)
        if gains:
            middle = panels[1, 0]
            draw(middle, "eval_context_gain", "context gain", COLOURS[0], marker="o")
            middle.axhline(PLATEAU, color="#707070", linestyle="--", linewidth=1.2)
            middle.set_ylabel("gain (nats)")
            label_ends(middle)
        if explores:
            draw(lower, "dynsparse/coverage", "DOF coverage", COLOURS[2], 100)
            draw(lower, "dynsparse/newborn_share", "newborn share", COLOURS[1], 100)
            draw(lower, "dynsparse/pruning_ratio", "pruning ratio", "#707070", 100, linestyle="--", linewidth=1.2)
            lower.set_ylabel("share (%)")
            lower.set_ylim(-3, 103)
            label_ends(lower)
        lower.set_xlabel(f"training FLOPs{unit}")
        lower.set_xlim(left=0)


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

    with picture(path, 1, 2, (9.6, 3.8), title, sharey=True) as (_, (left, right)):
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
        label_ends(right)


def plot_over_seconds(
    runs: Mapping[str, tuple[Sequence[Mapping[str, Any]], float]], path: str | PathLike[str], title: str = ""
) -> None:
    """
    Draw the loss of several runs against the seconds of their training, and below it their context gain where they
    have logged it. A log tells FLOPs, not seconds: between start and end they are taken to pass alike.

    Args:
        runs (`Mapping[str, tuple[Sequence[Mapping[str, Any]], float]]`):
            Name of each run -> its log, as for [`plot_training`], and how many seconds it has trained.
        path (`str` or `PathLike`):
            File to write; its suffix chooses the format. Missing folders are made.
        title (`str`, *optional*, defaults to `""`):
            Title of the picture.

    Raises:
        ValueError: if there is no run, or a run without loss or FLOPs.
    """
    if not runs:
        raise ValueError("`runs` must name at least one run. Got none. Pass `{'sparse': (log_history, 140.0), ...}`.")
    for name, (log_history, _) in runs.items():
        _require_keys(log_history, "loss", "eval_loss", run=name)
        _require_keys(log_history, "dynsparse/flops", run=name)

    def draw(axes: Axes, name: str, key: str, **style: Any) -> None:
        log_history, seconds = runs[name]
        steps, values = _series(log_history, key)
        if len(steps):
            total = _flops_of(log_history, _series(log_history, "step")[0]).max()
            axes.plot(_flops_of(log_history, steps) / total * seconds, values, **style)

    gains = any("eval_context_gain" in entry for log_history, _ in runs.values() for entry in log_history)
    with picture(path, 1 + gains, 1, (6.6, 5.2 if gains else 3.4), title, sharex=True, squeeze=False) as (_, panels):
        upper, lower = panels[0, 0], panels[-1, 0]
        for name, colour in zip(runs, cycle(COLOURS), strict=False):
            draw(upper, name, "loss", label=f"{name}, training", color=colour, linewidth=0.8, alpha=0.6)
            draw(upper, name, "eval_loss", label=f"{name}, evaluation", color=colour, marker="o")
            if gains:
                draw(lower, name, "eval_context_gain", label=name, color=colour, marker="o")
                lower.set_ylabel("context gain (nats)")
        upper.set_ylabel("loss (nats)")
        for axes in panels[:, 0]:
            label_ends(axes)
        lower.set_xlabel("time of training")
        lower.set_xlim(left=0)
        label_time(lower)


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
    with picture(path, 1, len(panels), (4.6 * len(panels), 3.8), title, squeeze=False) as (_, grid):
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

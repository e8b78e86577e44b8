"""When topology updates happen, the share of blocks that each replaces, and the density that it leads to."""

import math
from collections.abc import Callable
from dataclasses import dataclass


# Steps that a new block, which starts at zero, needs at least before updates compare it with the others.
STEPS_TO_LIVE = 100


def cosine(progress: float) -> float:
    """From 1 to 0 along half a cosine: the paper's schedule (arXiv:2108.06277, section 3)."""
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def constant(progress: float) -> float:
    """Always 1."""
    return 1.0


def linear(progress: float) -> float:
    """From 1 to 0 along a line."""
    return 1.0 - progress


def step(progress: float) -> float:
    """1, then a half, then 0: MEST (arXiv:2110.14032), after 90 and 120 of 160 epochs."""
    return 1.0 if progress < 90 / 160 else 0.5 if progress < 120 / 160 else 0.0


SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": cosine,
    "constant": constant,
    "linear": linear,
    "step": step,
}


def pruning_ratio_at(update: int, num_updates: int, pruning_ratio: float, pruning_schedule: str = "cosine") -> float:
    """
    `pr(t)` of update `t = 0 .. n-1`, with `t_end = n`: the first update replaces `pruning_ratio` of the active blocks.

    Raises:
        ValueError: for a ratio outside [0, 1] or an unknown schedule.
    """
    if not 0.0 <= pruning_ratio <= 1.0:
        raise ValueError(
            f"`pruning_ratio` is the share of active blocks that the first update replaces and must lie in [0, 1]. "
            f"Got {pruning_ratio}. The paper's optimum is 0.5."
        )
    if pruning_schedule not in SCHEDULES:
        raise ValueError(f"`pruning_schedule` must be one of {', '.join(SCHEDULES)}. Got {pruning_schedule!r}.")
    return pruning_ratio * SCHEDULES[pruning_schedule](update / num_updates)


def cubic(progress: float) -> float:
    """From 1 to 0, fast at first: gradual pruning (arXiv:1710.01878, section 3)."""
    return (1.0 - progress) ** 3


# The density at some progress of a run: 1 is the initial, 0 the final one.
DENSITY_SCHEDULES: dict[str, Callable[[float], float]] = {"constant": lambda progress: 0.0, "cubic": cubic}


def density_share(progress: float, schedule: str, begin: float = 0.0, end: float = 1.0) -> float:
    """
    Where the density of a model stands: 1 is the initial one, 0 that of its configuration. In terms of sparsity
    `s(t) = s_final + (s_initial - s_final) * share(t)`.

    Args:
        progress (`float`): share of the run that is done.
        schedule (`str`): a key of `DENSITY_SCHEDULES`, or a table of phases `"progress:share,progress:share,..."` from
            0 on: `"0:1,0.3:0,0.8:1"` is dense, sparse from 0.3 of the run, and dense again from 0.8.
        begin, end (`float`): shares of the run between which a named schedule goes from 1 to 0.

    Raises:
        ValueError: for an unknown schedule, a table that is none, or an end that is not after the beginning.
    """
    if not 0.0 <= begin < end <= 1.0:
        raise ValueError(
            f"The density must change between two shares of the run, 0 <= begin < end <= 1. Got density_begin={begin} "
            f"and density_end={end}."
        )
    if schedule in DENSITY_SCHEDULES:
        return DENSITY_SCHEDULES[schedule](min(1.0, max(0.0, (progress - begin) / (end - begin))))
    return [share for start, share in _phases(schedule) if start <= progress][-1]


def update_steps(
    total_steps: int,
    num_topology_updates: int | None = None,
    topology_update_every: float | None = None,
    topology_first_step: float | None = None,
    topology_last_step: float | None = None,
) -> tuple[int, ...]:
    """
    Optimiser steps (counted from 1) after which the topology is updated: either `num_topology_updates` of them, evenly
    spaced and with an equal stretch of training before the first and after the last, or one every so many steps.

    Args:
        total_steps (`int`): optimiser steps of the whole run.
        topology_update_every (`float`, *optional*): a number of steps, or below 1 a share of the run.
        topology_first_step, topology_last_step (`float`, *optional*): no update before or after, given in the same
            way. The last step of a run never updates: the new blocks would stay zero.

    Example:
        ```python
        >>> update_steps(30, num_topology_updates=2)
        (10, 20)
        >>> update_steps(30, topology_update_every=10)
        (10, 20)
        ```

    Raises:
        ValueError: if both or neither of `num_topology_updates` and `topology_update_every` are given, or the updates
            do not fit.
    """
    number, lengths = num_topology_updates, (topology_update_every, topology_first_step, topology_last_step)
    if (number is None) == (topology_update_every is None):
        raise ValueError(
            "Give exactly one of `num_topology_updates` and `topology_update_every`. Got num_topology_updates="
            f"{number} and topology_update_every={topology_update_every}."
        )
    if number == 0:
        return ()
    every, first, last = (in_steps(value, total_steps) for value in lengths)
    begin, end = 1 if first is None else first, total_steps - 1 if last is None else last
    bounded = first is not None or last is not None
    if begin < 1 or end >= max(total_steps, 1) or (bounded and begin > end):
        raise ValueError(
            "The first and last topology update must satisfy 1 <= topology_first_step <= topology_last_step < "
            f"total_steps = {total_steps}. Got topology_first_step={first}, topology_last_step={last}. Move them "
            "inside the run, or leave them out."
        )
    if every is not None:
        if every < 1:
            raise ValueError(f"`topology_update_every` must be a positive number of steps. Got {every}.")
        return tuple(step for step in range(every, end + 1, every) if step >= begin)
    if number is None or not 0 <= number <= end - begin + 1:
        raise ValueError(
            f"`num_topology_updates` must lie in [0, {end - begin + 1}] for {total_steps} steps with updates from "
            f"step {begin} to {end}. Got {number}. Train longer or ask for fewer updates."
        )
    # Half-open stretches: with the defaults the update t falls at (t + 1) / (n + 1) of the run.
    before, after = begin - 1 if first is None else begin, end + 1 if last is None else end
    gaps = number + (first is None) + (last is None) - 1
    shift = 1 if first is None else 0
    if gaps < 1:
        return (begin,)
    return tuple(math.floor(before + (t + shift) * (after - before) / gaps + 0.5) for t in range(number))


def default_num_updates(
    total_steps: int, first: float | None = None, last: float | None = None, interval: int = STEPS_TO_LIVE
) -> int:
    """
    Updates of a run that is not told how many: 80, the paper's optimum for 16 x 16 blocks, or as many as leave
    `interval` steps from one to the next and after the last. At least one, if the run has room for it: blocks that no
    other update follows live as long as the run.

    Args:
        total_steps, first, last: see `update_steps`.

    Example:
        ```python
        >>> [default_num_updates(steps) for steps in (1, 12, 300, 500, 100_000)]
        [0, 1, 2, 4, 80]
        ```
    """
    if total_steps < 2:
        return 0
    begin, end = in_steps(first, total_steps) or 0, in_steps(last, total_steps) or total_steps
    fitting = (end - begin) // interval + 1 - (first is None) - (last is None)
    return max(1, min(80, fitting))


@dataclass(frozen=True)
class PlannedUpdate:
    """
    One update of a run as it is laid out.

    Args:
        step (`int`): the optimiser step that it follows.
        pruning_ratio (`float`): see `pruning_ratio_at`.
        density_share (`float`): where the density stands after it; see `density_share`.
    """

    step: int
    pruning_ratio: float
    density_share: float


def _phases(table: str) -> list[tuple[float, float]]:
    try:
        phases = [(float(start), float(share)) for start, share in (part.split(":") for part in table.split(","))]
    except ValueError:
        phases = []
    starts = [start for start, _ in phases]
    if not phases or starts[0] != 0.0 or starts != sorted(set(starts)) or not all(0 <= x <= 1 for _, x in phases):
        raise ValueError(
            f"`density_schedule` must be one of {', '.join(DENSITY_SCHEDULES)}, or phases of ascending progress from "
            f"0, each with a share in [0, 1]. Got {table!r}. For example '0:1,0.3:0': dense, and from 0.3 of the run "
            "as sparse as the configuration says."
        )
    return phases


def in_steps(value: float | None, total_steps: int) -> int | None:
    """
    A number of steps, given as such or, below 1, as a share of the run.

    Raises:
        ValueError: for a fraction above 1.
    """
    if value is None or not 0 < value < 1:
        if value is not None and value != int(value):
            raise ValueError(f"Steps must be whole, or below 1 a share of the run. Got {value}.")
        return None if value is None else int(value)
    return max(1, math.floor(value * total_steps))

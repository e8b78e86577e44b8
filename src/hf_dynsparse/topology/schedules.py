"""When topology updates happen, and the share of blocks that each replaces."""

import math
from collections.abc import Callable


def cosine(progress: float) -> float:
    """From 1 to 0 along half a cosine: the paper's schedule (arXiv:2108.06277, section 3)."""
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def constant(progress: float) -> float:
    """Always 1."""
    return 1.0


def linear(progress: float) -> float:
    """From 1 to 0 along a line."""
    return 1.0 - progress


SCHEDULES: dict[str, Callable[[float], float]] = {"cosine": cosine, "constant": constant, "linear": linear}


def pruning_ratio_at(update: int, num_updates: int, pruning_ratio: float, schedule: str = "cosine") -> float:
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
    if schedule not in SCHEDULES:
        raise ValueError(f"`schedule` must be one of {', '.join(SCHEDULES)}. Got {schedule!r}.")
    return pruning_ratio * SCHEDULES[schedule](update / num_updates)


def update_steps(
    total_steps: int,
    num_updates: int | None = None,
    every: int | None = None,
    first: int | None = None,
    last: int | None = None,
) -> tuple[int, ...]:
    """
    Optimiser steps (counted from 1) after which the topology is updated: either `num_updates` of them, evenly spaced
    and with an equal stretch of training before the first and after the last, or one `every` so many steps.

    Args:
        total_steps (`int`): optimiser steps of the whole run.
        first, last (`int`, *optional*): no update before `first` or after `last`. The last step of a run never
            updates: the new blocks would stay zero.

    Example:
        ```python
        >>> update_steps(30, num_updates=2)
        (10, 20)
        >>> update_steps(30, every=10)
        (10, 20)
        ```

    Raises:
        ValueError: if both or neither of `num_updates` and `every` are given, or the updates do not fit.
    """
    if (num_updates is None) == (every is None):
        raise ValueError(
            f"Give exactly one of `num_updates` and `every`. Got num_updates={num_updates} and every={every}."
        )
    begin, end = 1 if first is None else first, total_steps - 1 if last is None else last
    if num_updates == 0:
        return ()
    bounded = first is not None or last is not None
    if begin < 1 or end >= max(total_steps, 1) or (bounded and begin > end):
        raise ValueError(
            f"The first and last topology update must satisfy 1 <= first <= last < total_steps = {total_steps}. "
            f"Got first={first}, last={last}. Move them inside the run, or leave them out."
        )
    if every is not None:
        if every < 1:
            raise ValueError(f"`every` must be a positive number of steps. Got {every}.")
        return tuple(step for step in range(every, end + 1, every) if step >= begin)
    if num_updates is None or num_updates < 0 or num_updates > end - begin + 1:
        raise ValueError(
            f"`num_updates` must lie in [0, {end - begin + 1}] for {total_steps} steps with updates from step {begin} "
            f"to {end}. Got {num_updates}. Train longer or ask for fewer updates."
        )
    # Half-open stretches: with the defaults the update t falls at (t + 1) / (n + 1) of the run.
    before, after = begin - 1 if first is None else begin, end + 1 if last is None else end
    gaps = num_updates + (first is None) + (last is None) - 1
    shift = 1 if first is None else 0
    if gaps < 1:
        return (begin,) if num_updates else ()
    return tuple(math.floor(before + (t + shift) * (after - before) / gaps + 0.5) for t in range(num_updates))

"""Learning-rate rewinding: while a model is pruned, each update finds a rate near the peak (arXiv:2111.05754)."""

from collections.abc import Callable

from ..topology import TopologySettings
from ..topology.schedules import in_steps


def rewound_multiplier(step: int, total: int, warmup: int, begin: int, end: int, every: int) -> float:
    """
    The share of the peak learning rate after `step` optimiser steps, of a linear decay that is rewound `every` so many
    steps while a model is pruned (arXiv:2111.05754, section 3.1).

    With `T0 = total - (end - begin)` it is at step `t` of the warm-up `t / warmup`; then `(T0 - t) / (T0 - warmup)`
    before the window, `(T0 - t + floor((t - begin) / every) * every) / (T0 - warmup)` inside, and `(total - t) / (T0 -
    warmup)` after it. So the window costs no decay, and its end is where its beginning was.

    Never above 1. The authors' multiplier is `T0 / (T0 - warmup)` whenever a window from the first step on is rewound.

    Args:
        step (`int`): optimiser steps done, from 0 on.
        total (`int`): those of the run.
        warmup (`int`): over which the rate rises.
        begin, end (`int`): steps between which the model is pruned.
        every (`int`): steps from one rewind to the next, counted from `begin`.
    """
    if step < warmup:
        return step / warmup
    unpruned = total - (end - begin)
    if step < begin:
        left = unpruned - step
    elif step < end:
        left = unpruned - step + (step - begin) // every * every
    else:
        left = total - step
    return min(1.0, max(0.0, left / (unpruned - warmup)))


def rewinding(settings: TopologySettings, total: int, warmup: int) -> Callable[[int], float]:
    """
    `rewound_multiplier` of a run, by the step: the window is that of its density schedule, from the last topology
    update before it on, and the interval that of the updates.

    Args:
        settings (`TopologySettings`): of the run.
        total, warmup (`int`): optimiser steps.

    Raises:
        ValueError: if there is no cubic schedule or no interval, or the window leaves nothing to decay over.
    """
    check_rewinding(settings)
    begin, end = (round(share * total) for share in (settings.density_begin, settings.density_end))
    every = in_steps(settings.topology_update_every, total) or 1
    begin -= begin % every  # updates are counted from step 0, and rewinds are to fall on them
    if total - (end - begin) <= warmup:
        raise ValueError(
            "With `learning_rate_rewinding` the rate decays over the steps outside of the pruning window, less the "
            f"warm-up. Got {total} steps, a window from {begin} to {end} and {warmup} steps of warm-up. Choose a "
            "smaller `density_end`, or a shorter warm-up."
        )
    return lambda step: rewound_multiplier(step, total, warmup, begin, end, every)


def check_rewinding(settings: TopologySettings) -> None:
    """
    Raises:
        ValueError: if topology settings have no pruning window, or no interval.
    """
    if settings.density_schedule != "cubic" or settings.topology_update_every is None:
        raise ValueError(
            "`learning_rate_rewinding` goes back to the peak at each update of a gradual pruning. Got "
            f"density_schedule={settings.density_schedule!r} and topology_update_every="
            f"{settings.topology_update_every}. Choose 'cubic' and an interval, or `method='prune_ofa'`."
        )

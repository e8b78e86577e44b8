"""Arms timed in turn, A B A B, in one process: what slows the machine for a moment slows all of them."""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch


WARM_UP = 2  # untimed turns: caches, index orders, choice of a backend
SHORTEST = 0.02  # seconds of a sample of the first arm; shorter work is repeated within the sample

Phases = Sequence[Callable[[], object]]
Samples = list[list[float]]  # [turns][phases]


@dataclass(frozen=True)
class Clock:
    """What a figure counts."""

    name: str
    read: Callable[[], float]


def choose_clock(device: torch.device) -> Clock:
    """CPU time where one thread works, because other processes do not disturb it; else wall time."""
    if device.type == "cuda":
        return Clock("wall time, device synchronised", _synchronised_time)
    if torch.get_num_threads() == 1:
        return Clock("CPU time of the process", time.process_time)
    return Clock("wall time", time.perf_counter)


def _synchronised_time() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def time_in_turn(arms: Mapping[Any, Phases], clock: Clock, repeats: int) -> dict[Any, Samples]:
    """Seconds of each phase of each arm, `repeats` times, all arms once in every turn; the first arm sets the pace."""
    loops = 1
    for _ in range(WARM_UP):
        warm = [sum(_sample(phases, clock, 1)) for phases in arms.values()]
        loops = max(1, math.ceil(SHORTEST / max(warm[0], 1e-6)))
    samples: dict[Any, Samples] = {name: [] for name in arms}
    for _ in range(repeats):
        for name, phases in arms.items():
            samples[name].append(_sample(phases, clock, loops))
    return samples


def _sample(phases: Phases, clock: Clock, loops: int) -> list[float]:
    if len(phases) == 1:  # the clock is read once, since the work may be a few microseconds
        began = clock.read()
        for _ in range(loops):
            phases[0]()
        return [(clock.read() - began) / loops]
    seconds = [0.0] * len(phases)
    for _ in range(loops):
        for place, phase in enumerate(phases):
            began = clock.read()
            phase()
            seconds[place] += (clock.read() - began) / loops
    return seconds


def sample_seconds(call: Callable[[], object], clock: Clock) -> float:
    """Seconds of one `call`, repeated until the sample is long enough."""
    once = _sample([call], clock, 1)[0]
    return _sample([call], clock, max(1, math.ceil(SHORTEST / max(once, 1e-6))))[0]


def median_seconds(samples: Samples, phase: int = 0) -> float:
    """Median over the turns."""
    return statistics.median(sample[phase] for sample in samples)


def median_ratio(own: Samples, dense: Samples, *phases: int) -> float:
    """Median over the turns of the time of `phases`, by default the first, over that of `dense` in the same turn."""
    wanted = phases or (0,)
    return statistics.median(
        sum(one[phase] for phase in wanted) / sum(other[phase] for phase in wanted)
        for one, other in zip(own, dense, strict=True)
    )

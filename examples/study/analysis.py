"""
What many pre-training runs say together: the best of each configuration, the Pareto front, and what a dense model of
equal loss would have cost (arXiv:2108.06277). Pure functions of finished runs.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
from study.intervals import Interval, confidence_interval
from study.runs import TOPOLOGY, StudyRun
from study.words import difference, key_of, label, less, order

from hf_dynsparse.optim.groups import sparse_learning_rate
from hf_dynsparse.reports.facts import PLATEAU


# What is not part of a configuration: it is averaged over, or tuned.
SEED, LEARNING_RATE = "seed", "learning_rate"


@dataclass(frozen=True)
class Configuration:
    """
    Runs that differ in nothing but their seed: those at the best of the learning rates that were tried.

    Args:
        runs (`tuple[StudyRun, ...]`): one or more.
        sweep (`Mapping[float, float]`): learning rate -> mean loss over its seeds, of all rates that were tried.
    """

    runs: tuple[StudyRun, ...]
    sweep: Mapping[float, float]

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Without seed and learning rate."""
        return configuration_settings(self.runs[0])

    @property
    def plan(self) -> dict[str, Any]:
        """What the plan gives it, without seed and learning rate."""
        return less(self.runs[0].plan, SEED, LEARNING_RATE)

    @property
    def is_dense(self) -> bool:
        """A member of the dense family."""
        return self.settings["method"] == "dense"

    @property
    def is_probe(self) -> bool:
        """Not a method: what its frozen dense weights cost is not counted."""
        return bool(self.settings.get("untrained_rest"))

    @property
    def learning_rate(self) -> float:
        """The best one."""
        return float(self.runs[0].settings[LEARNING_RATE])

    @property
    def loss(self) -> float:
        """Mean over the seeds, in nats."""
        return self.mean("eval_loss")

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds; `None` of a single one."""
        losses = [number(run.results["eval_loss"]) for run in self.runs]
        return float(np.std(losses, ddof=1)) if len(losses) > 1 else None

    @property
    def on_plateau(self) -> int:
        """How many of the runs have hardly learnt more than the frequencies of pieces, as far as they have told."""
        return sum(number(run.results.get("context_gain")) < PLATEAU for run in self.runs)

    def mean(self, result: str) -> float:
        """Mean of a result over the seeds; not a number if a run lacks it."""
        return fmean(number(run.results.get(result)) for run in self.runs)


def configuration_settings(run: StudyRun) -> dict[str, Any]:
    """Settings less seed and learning rate."""
    return less(run.settings, SEED, LEARNING_RATE)


def best_configurations(runs: Iterable[StudyRun]) -> list[Configuration]:
    """
    The runs by configuration, each at the learning rate whose mean loss over the seeds is lowest. Of several runs with
    the same settings, seed and rate the first counts.
    """
    groups: dict[str, dict[float, dict[Any, StudyRun]]] = {}
    for run in runs:
        rates = groups.setdefault(key_of(configuration_settings(run)), {})
        rates.setdefault(float(run.settings[LEARNING_RATE]), {}).setdefault(run.settings[SEED], run)
    found = []
    for rates in groups.values():
        losses = {
            rate: fmean(number(run.results["eval_loss"]) for run in seeds.values()) for rate, seeds in rates.items()
        }
        best = min(losses, key=lambda rate: (math.inf if math.isnan(losses[rate]) else losses[rate], rate))
        found.append(Configuration(tuple(rates[best].values()), dict(sorted(losses.items()))))
    return found


def pareto_front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """
    The `(cost, loss)` that no other undercuts in both, by rising cost and so falling loss.

    Example:
        ```python
        >>> pareto_front([(4, 1.0), (1, 3.0), (2, 2.0), (3, 2.5)])
        [(1, 3.0), (2, 2.0), (4, 1.0)]
        ```
    """
    front: list[tuple[float, float]] = []
    for cost, loss in sorted(point for point in points if all(map(math.isfinite, point))):
        if not front or loss < front[-1][1]:
            front.append((cost, loss))
    return front


def cost_at_loss(family: Iterable[tuple[float, float]], loss: float) -> float | None:
    """
    What `family`, points `(cost, loss)`, would pay for `loss`: on its Pareto front, linear between its members in the
    logarithm of the cost. `None` outside of it: nothing is extrapolated.
    """
    front = pareto_front(family)
    if not front or not front[-1][1] <= loss <= front[0][1]:
        return None
    costs, losses = zip(*reversed(front), strict=True)
    return float(np.exp(np.interp(loss, losses, np.log(costs))))


def loss_at_cost(family: Iterable[tuple[float, float]], cost: float) -> float | None:
    """The same the other way round: the loss that `family` would reach for `cost`."""
    front = pareto_front(family)
    if not front or not front[0][0] <= cost <= front[-1][0]:
        return None
    costs, losses = zip(*front, strict=True)
    return float(np.interp(np.log(cost), np.log(costs), losses))


def dense_family(configurations: Iterable[Configuration], cost: str = "flops") -> list[tuple[float, float]]:
    """`(cost, loss)` of the dense configurations; `cost` is `"flops"` or `"seconds"`."""
    return [(each.mean(cost), each.loss) for each in configurations if each.is_dense]


def dense_families(
    seeds: Iterable[Any], configurations: Iterable[Configuration], cost: str
) -> list[list[tuple[float, float]]]:
    """The same of each seed; of the means over seeds for all of them, if a member lacks one."""
    members = [each for each in configurations if each.is_dense]
    families = [
        [
            (number(run.results.get(cost)), number(run.results["eval_loss"]))
            for each in members
            for run in each.runs
            if run.settings[SEED] == seed
        ]
        for seed in seeds
    ]
    complete = all(len(family) == len(members) for family in families)
    return families if complete else [dense_family(members, cost) for _ in families]


def cost_ratio(
    configuration: Configuration, family: Iterable[tuple[float, float]], cost: str = "flops"
) -> float | None:
    """
    Its cost over what the dense family pays for the same loss: 0.48 (B = 1) to 0.83 (B = 16) in the paper's FLOPs for
    Base. `None` if no member of the family is as good, or none as bad.
    """
    dense = cost_at_loss(family, configuration.loss)
    return None if dense is None else configuration.mean(cost) / dense


def cost_ratio_interval(
    configuration: Configuration, configurations: Sequence[Configuration], cost: str = "flops"
) -> Interval | None:
    """
    [`cost_ratio`] with its interval over the seeds, both of the logarithm: see [`dense_families`]. Without interval
    where there is a single seed, or one is outside of its family; `None` if the mean is.
    """
    ratios = []
    families = dense_families((run.settings[SEED] for run in configuration.runs), configurations, cost)
    for run, family in zip(configuration.runs, families, strict=True):
        dense = cost_at_loss(family, number(run.results["eval_loss"]))
        ratios += [] if dense is None else [math.log(number(run.results.get(cost)) / dense)]
    if 1 < len(ratios) == len(configuration.runs):
        found = confidence_interval(ratios)
        return Interval(*(math.exp(found.mean + end) for end in (0.0, -found.half, found.half)), found.count)
    mean = cost_ratio(configuration, dense_family(configurations, cost), cost)
    return None if mean is None else Interval(mean, None, None, len(configuration.runs))


def variations(configurations: Iterable[Configuration], key: str) -> dict[str, list[Configuration]]:
    """
    Groups of two or more configurations that differ in the setting `key` alone, in the order of its values, under a
    label that says in what the groups differ.
    """
    ignored = {key, "method"} if key in TOPOLOGY else {key}
    if key == "method":
        ignored |= TOPOLOGY  # a method is a preset of these
    groups: dict[str, list[Configuration]] = {}
    for each in configurations:
        if not each.is_dense and not each.is_probe and each.settings.get(key) is not None:
            groups.setdefault(key_of(less(each.settings, *ignored)), []).append(each)
    kept = []
    for group in groups.values():
        line, _ = plainest(group, key)
        if len(line) > 1:
            kept.append(sorted(line, key=lambda each: order(each.settings[key])))
    labels = label([group[0] for group in kept], ignored)
    return dict(zip(labels, kept, strict=True))


def size_of(settings: Mapping[str, Any]) -> str:
    """Name of the size of the model."""
    return str(settings.get("size", settings.get("preset", "mini")))


def plainest(
    configurations: Iterable[Configuration], *keys: str
) -> tuple[list[Configuration], list[tuple[Configuration, str]]]:
    """
    One configuration for each combination of the settings `keys`: that with the fewest settings in the plan, of as
    many the lowest loss. And the others, its variants, with what sets each apart from it in words.
    """
    shown: dict[str, Configuration] = {}
    variants = []
    for each in sorted(configurations, key=lambda each: (len(each.plan), each.loss)):
        plain = shown.setdefault(key_of([each.settings.get(key) for key in keys]), each)
        if plain is not each:
            variants.append((each, difference(each.settings, plain.settings)))
    return list(shown.values()), variants


class Series(NamedTuple):
    """What the members of a sparse family have in common."""

    method: str
    block_size: str
    sparsity: float


def series(
    configurations: Iterable[Configuration],
) -> tuple[dict[Series, list[Configuration]], list[tuple[Configuration, str]]]:
    """
    Sparse configurations by method, block size and sparsity, each line by rising FLOPs; and the variants of those,
    with what sets them apart: see [`plainest`].
    """
    sparse = (each for each in configurations if not each.is_dense and not each.is_probe)
    shown, variants = plainest(sparse, "size", "preset", *Series._fields)
    lines: dict[Series, list[Configuration]] = {}
    for each in sorted(shown, key=lambda each: each.mean("flops")):
        lines.setdefault(Series(*(each.settings[key] for key in Series._fields)), []).append(each)
    return dict(sorted(lines.items(), key=lambda item: [order(part) for part in item[0]])), variants


def learning_rate_rule(each: Configuration, configurations: Iterable[Configuration]) -> float | None:
    """
    The best learning rate of its dense twin in the study, scaled by [`sparse_learning_rate`]; `None` without a twin.
    """
    for twin in configurations:
        if twin.is_dense and size_of(twin.settings) == size_of(each.settings) and not each.is_dense:
            return sparse_learning_rate(twin.learning_rate, each.settings["sparsity"])
    return None


def number(value: Any) -> float:
    return math.nan if value is None else float(value)

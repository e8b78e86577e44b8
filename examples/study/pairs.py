"""
What a dynamic topology changes: runs that differ in their method and in nothing else, in pairs of one seed. The chance
of a seed is in both runs of a pair, so that the difference tells less of it than either loss.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from study.analysis import LEARNING_RATE, SEED, Configuration, number
from study.intervals import Interval, confidence_interval
from study.runs import TOPOLOGY, StudyRun
from study.words import key_of, less, words


# What makes no difference while the topology stays as it is.
OF_UPDATES = TOPOLOGY | {"method", "block_age_adam", "new_block_warmup"}


@dataclass(frozen=True)
class PairGroup:
    """
    Two configurations, each at its best learning rate, that differ in their method, and their runs of equal seeds.

    Args:
        static, dynamic (`Configuration`): what is compared.
        pairs (`tuple[tuple[StudyRun, StudyRun], ...]`): of a seed each, the static run first; one or more.
        alone (`tuple[Any, ...]`): seeds of a single run, or of two with other data or steps.
    """

    static: Configuration
    dynamic: Configuration
    pairs: tuple[tuple[StudyRun, StudyRun], ...]
    alone: tuple[Any, ...]

    @property
    def common(self) -> str:
        """What both have, in words."""
        return words(less(self.dynamic.plan, *OF_UPDATES).items())

    @property
    def differs(self) -> str:
        """What the other has instead of a static topology, in words."""
        return words((key, value) for key, value in self.dynamic.plan.items() if key in OF_UPDATES) or "dynsparse"

    @property
    def learning_rates(self) -> str:
        """One, or those of either if they differ."""
        return " / ".join(dict.fromkeys(f"{each.learning_rate:g}" for each in (self.static, self.dynamic)))

    @property
    def seeds(self) -> list[Any]:
        """Those of the pairs."""
        return [dynamic.settings[SEED] for _, dynamic in self.pairs]

    def differences(self, result: str = "eval_loss") -> list[float]:
        """By how much each dynamic run is better: loss is the better the lower, context gain the higher."""
        sign = -1.0 if result == "eval_loss" else 1.0
        found = [[number(run.results.get(result)) for run in pair] for pair in self.pairs]
        return [sign * (dynamic - static) for static, dynamic in found]

    def interval(self, result: str = "eval_loss") -> Interval:
        """Their mean and 95 % interval; not a number if a run has not told."""
        return confidence_interval(self.differences(result))

    def of_dynamic(self, result: str) -> float:
        """Mean of a result over the dynamic runs of the pairs."""
        return Configuration(tuple(other for _, other in self.pairs), {}).mean(result)

    @property
    def on_plateau(self) -> int:
        """How many runs of the pairs have hardly learnt more than the frequencies of pieces."""
        return Configuration(tuple(run for pair in self.pairs for run in pair), {}).on_plateau


def find_pairs(configurations: Iterable[Configuration]) -> list[PairGroup]:
    """Each dynamic configuration beside the static one that has all else in common, if they share a seed."""
    sparse = [each for each in configurations if not each.is_dense and not each.is_probe]
    static: dict[str, Configuration] = {}
    for each in sorted(sparse, key=lambda each: len(each.plan)):
        if each.settings["method"] == "static":
            static.setdefault(_in_common(each), each)
    groups = []
    for each in sparse:
        partner = static.get(_in_common(each))
        if partner is None or each.settings["method"] == "static":
            continue
        one, other = ({run.settings[SEED]: run for run in side.runs} for side in (partner, each))
        pairs = {seed: (one[seed], other[seed]) for seed in one if seed in other and _is_pair(one[seed], other[seed])}
        if pairs:
            alone = tuple(seed for seed in {**one, **other} if seed not in pairs)
            groups.append(PairGroup(partner, each, tuple(pairs.values()), alone))
    return groups


def _in_common(each: Configuration) -> str:
    return key_of(less(each.settings, LEARNING_RATE, *OF_UPDATES))


def _is_pair(one: StudyRun, other: StudyRun) -> bool:
    """Whether two runs have had the same data and as many steps, by what they recorded."""
    return all(one.results.get(name) == other.results.get(name) for name in ("data", "steps"))

"""What a topology update did to a whole model."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch

from ..nn.linear import BlockSparseLinear
from .exploration import block_ages, dof_coverage
from .update import LayerUpdate


logger = logging.getLogger(__name__)

# Below this newborn survival an update undoes what the one before has done.
CHURN = 0.1

# Scores of what a block does, rather than of its size.
BY_USE = ("weight_gradient", "fisher", "saliency")


@dataclass(frozen=True)
class TopologyReport:
    """
    One topology update of a model.

    Args:
        update (`int`): its number, from 0.
        pruning_ratio (`float`): `pr(t)`.
        removed (`int`): blocks replaced, over all layers.
        newborn_share (`float`): share of them that the update just before had activated (arXiv:2108.06277, section 4).
        newborn_survival (`float`): share of the blocks that the update just before had activated which this one kept;
            1 if there were none.
        coverage (`float`): DOF coverage after the update.
        block_age (`float`): mean age of the active blocks, in updates survived.
        layers (`dict[str, LayerUpdate]`): the same by layer name.
    """

    update: int
    pruning_ratio: float
    removed: int
    newborn_share: float
    newborn_survival: float
    coverage: float
    block_age: float
    layers: dict[str, LayerUpdate]


def report_update(
    layers: Mapping[str, BlockSparseLinear], done: dict[str, LayerUpdate], update: int, pruning_ratio: float
) -> TopologyReport:
    """The report of update number `update`, just `done`."""
    removed = sum(layer.removed for layer in done.values())
    newborn_removed = sum(layer.newborn_removed for layer in done.values())
    newborn = sum(layer.newborn for layer in done.values())
    ages = [block_ages(layer, update + 1).float().mean() for layer in layers.values()]
    return TopologyReport(
        update=update,
        pruning_ratio=pruning_ratio,
        removed=removed,
        newborn_share=newborn_removed / removed if removed else 0.0,
        newborn_survival=1 - newborn_removed / newborn if newborn else 1.0,
        coverage=dof_coverage(layers.values()),
        block_age=float(torch.stack(ages).mean()),
        layers=done,
    )


class ChurnWarning:
    """
    Says once if two updates in a row kept hardly anything of what the update before them had brought.

    Args:
        prune_score (`str`): of the run.
    """

    def __init__(self, prune_score: str) -> None:
        self._prune_score = prune_score
        self._survivals: list[float] = []

    def look_at(self, report: TopologyReport) -> None:
        """To be called with the report of every update."""
        self._survivals.append(report.newborn_survival)
        churns = [max(pair) < CHURN for pair in pairwise(self._survivals)]
        if churns and churns[-1] and sum(churns) == 1:
            by_use = f"; or prune by 'weight_gradient' instead of {self._prune_score!r}"
            logger.warning(
                "New blocks do not live: of what the update just before had brought, topology updates %d and %d kept "
                "%.0f %% and %.0f %%: the topology churns in place. Give new blocks more steps to grow: fewer "
                "updates, or a longer interval%s.",
                report.update,
                report.update + 1,
                *(100 * survival for survival in self._survivals[-2:]),
                "" if self._prune_score in BY_USE else by_use,
            )

"""What a topology update did to a whole model."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..nn.linear import BlockSparseLinear
from .exploration import block_ages, dof_coverage
from .update import LayerUpdate


@dataclass(frozen=True)
class TopologyReport:
    """
    One topology update of a model.

    Args:
        update (`int`): its number, from 0.
        pruning_ratio (`float`): `pr(t)`.
        removed (`int`): blocks replaced, over all layers.
        newborn_share (`float`): share of them that the update just before had activated (arXiv:2108.06277, section 4).
        coverage (`float`): DOF coverage after the update.
        block_age (`float`): mean age of the active blocks, in updates survived.
        layers (`dict[str, LayerUpdate]`): the same by layer name.
    """

    update: int
    pruning_ratio: float
    removed: int
    newborn_share: float
    coverage: float
    block_age: float
    layers: dict[str, LayerUpdate]


def report_update(
    layers: Mapping[str, BlockSparseLinear], done: dict[str, LayerUpdate], update: int, pruning_ratio: float
) -> TopologyReport:
    """The report of update number `update`, just `done`."""
    removed = sum(layer.removed for layer in done.values())
    newborn = sum(layer.newborn_removed for layer in done.values())
    ages = [block_ages(layer, update + 1).float().mean() for layer in layers.values()]
    return TopologyReport(
        update=update,
        pruning_ratio=pruning_ratio,
        removed=removed,
        newborn_share=newborn / removed if removed else 0.0,
        coverage=dof_coverage(layers.values()),
        block_age=float(torch.stack(ages).mean()),
        layers=done,
    )

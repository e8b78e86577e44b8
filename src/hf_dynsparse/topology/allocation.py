"""How many active blocks each layer is to have: as scheduled for each, or a total shared out by what they hold."""

import math
from collections.abc import Mapping

import torch

from ..distributions import DISTRIBUTIONS
from ..layout import count_active_blocks
from ..nn import BlockSparseLinear
from .momentum import mean_momentum
from .selection import select_highest
from .update import replaced_count


Layers = Mapping[str, BlockSparseLinear]

ALLOCATIONS = ("layer", "global", "momentum")


class DensityPath:
    """
    Active blocks of each layer on the way from an initial density to a final one.

    Args:
        initial, final (`Mapping[str, float]`): sparsity of each layer at the ends.
    """

    def __init__(self, layers: Layers, initial: Mapping[str, float], final: Mapping[str, float]) -> None:
        self._ends = {name: (layer.num_blocks, initial[name], final[name]) for name, layer in layers.items()}

    @classmethod
    def to_model(cls, layers: Layers, nnzb: Mapping[str, int], initial_sparsity: float) -> "DensityPath":
        """
        From `initial_sparsity` to the `nnzb` active blocks of a model. On the way the sparsity of every layer is the
        same multiple of its final one, so that the whole model has what the schedule says.
        """
        positions = sum(layer.in_features * layer.out_features for layer in layers.values())
        active = sum(nnzb[name] * math.prod(layer.block_shape) for name, layer in layers.items())
        end = 1.0 - active / positions
        final = {name: 1.0 - nnzb[name] / layer.num_blocks for name, layer in layers.items()}
        initial = {name: initial_sparsity * own / end if end else initial_sparsity for name, own in final.items()}
        return cls(layers, initial, final)

    @classmethod
    def from_model(
        cls, layers: Layers, nnzb: Mapping[str, int], final_sparsity: float, distribution: str
    ) -> "DensityPath":
        """
        From the `nnzb` active blocks of a model to `final_sparsity`, spread over its layers by `distribution`.

        Raises:
            ValueError: if the model has fewer blocks than it is to end with.
        """
        shapes = {name: layer.shape for name, layer in layers.items()}
        densities = DISTRIBUTIONS[distribution](shapes, 1.0 - final_sparsity)
        initial = {name: 1.0 - nnzb[name] / layer.num_blocks for name, layer in layers.items()}
        path = cls(layers, initial, {name: 1.0 - density for name, density in densities.items()})
        entries = {name: math.prod(layer.block_shape) for name, layer in layers.items()}
        begin, end = (sum(counts[name] * entries[name] for name in entries) for counts in (nnzb, path.at(0.0)))
        if end > begin:
            raise ValueError(
                f"A run prunes from the model's sparsity to `final_sparsity`. Got {final_sparsity} for a model with "
                f"{begin:,} active entries, where it leaves {end:,}. Start from a denser model: all blocks of a "
                "trained dense one, for example."
            )
        return path

    def at(self, share: float) -> dict[str, int]:
        """
        Active blocks of each layer at a share of the way back from the final density (0) to the initial one (1):
        `count_active_blocks` of `s_final + (s_initial - s_final) * share`.
        """
        return {
            name: count_active_blocks(blocks, 1.0 - (final + (initial - final) * share))
            for name, (blocks, initial, final) in self._ends.items()
        }


def allocate_globally(layers: Layers, total: int, scores: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """
    Active blocks of each layer if the `total` with the highest scores of all layers stay, at least one in each; a
    model with fewer grows in proportion to the free positions.

    Args:
        scores (`Mapping[str, torch.Tensor]`): of the active blocks of each layer, of shape `(nnzb,)`.
    """
    counts = {name: layer.nnzb for name, layer in layers.items()}
    missing = total - sum(counts.values())
    if missing >= 0:
        free = {name: layer.num_blocks - layer.nnzb for name, layer in layers.items()}
        grown = share_out(missing, free, free)
        return {name: counts[name] + grown[name] for name in counts}
    ranked = [score.index_fill(0, score.argmax(), math.inf) for score in scores.values()]
    owner = torch.repeat_interleave(torch.arange(len(ranked)), torch.tensor([len(score) for score in ranked]))
    stay = select_highest(torch.cat(ranked), max(total, len(ranked))).cpu()
    return dict(zip(scores, torch.bincount(owner[stay], minlength=len(ranked)).tolist(), strict=True))


def allocate_by_momentum(layers: Layers, total: int, pruning_ratio: float, readmit: bool) -> dict[str, int]:
    """
    Active blocks of each layer if each gives up those that it replaces and what makes up `total` is shared out in
    proportion to the layers' mean gradient momentum (SNFS, arXiv:1907.04840, section 3).
    """
    left = {
        name: max(1, layer.nnzb - replaced_count(pruning_ratio, layer.nnzb, layer.num_blocks, readmit))
        for name, layer in layers.items()
    }
    free = {name: layer.num_blocks - layer.nnzb for name, layer in layers.items()}
    weights = {name: mean_momentum(layer) for name, layer in layers.items()}
    grown = share_out(min(total - sum(left.values()), sum(free.values())), weights, free)
    return {name: left[name] + grown[name] for name in left}


def share_out(total: int, weights: Mapping[str, float], limits: Mapping[str, int]) -> dict[str, int]:
    """
    Whole numbers in proportion to `weights`, none above its limit, that add up to `total`: largest remainders first,
    ties to the earlier. What a limit cuts off goes to the others.
    """
    shares = dict.fromkeys(weights, 0)
    while (rest := total - sum(shares.values())) > 0:
        room = {name: limits[name] - shares[name] for name in weights if shares[name] < limits[name]}
        if not room:
            break
        sum_of_weights = sum(weights[name] for name in room)
        exact = {name: rest * (weights[name] / sum_of_weights if sum_of_weights else 1 / len(room)) for name in room}
        whole = {name: min(room[name], math.floor(exact[name])) for name in room}
        if not any(whole.values()):
            for name in sorted(room, key=lambda name: -exact[name])[:rest]:
                whole[name] = 1
        for name, count in whole.items():
            shares[name] += count
    return shares

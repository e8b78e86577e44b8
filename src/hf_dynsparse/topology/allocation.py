"""How many active blocks each layer is to have: as scheduled for each, or a total shared out by what they hold."""

import math
from collections.abc import Mapping

import torch

from ..blocks.distributions import DISTRIBUTIONS
from ..blocks.sizes import count_active_blocks
from ..nn.linear import BlockSparseLinear
from .exploration import mean_momentum
from .scores import select_highest
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
        end = 1.0 - count_entries(layers, nnzb) / positions
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
        begin, end = count_entries(layers, nnzb), count_entries(layers, path.at(0.0))
        if end >= begin + largest_block(layers):  # a run before this one may have left it a block short
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


def count_entries(layers: Layers, nnzb: Mapping[str, int]) -> int:
    """Active entries of `layers` with so many active blocks each."""
    return sum(nnzb[name] * entries for name, entries in _block_entries(layers).items())


def allocate_globally(layers: Layers, total: int, scores: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """
    Active blocks of each layer if those with the highest scores of all layers stay, up to `total` active entries and
    at least one block in each; a model with fewer grows in proportion to the free positions.

    Args:
        scores (`Mapping[str, torch.Tensor]`): of the active blocks of each layer, of shape `(nnzb,)`.
    """
    counts, entries = {name: layer.nnzb for name, layer in layers.items()}, _block_entries(layers)
    missing = total - count_entries(layers, counts)
    if missing >= 0:
        free = {name: layer.num_blocks - layer.nnzb for name, layer in layers.items()}
        grown = share_out(missing, {name: free[name] * entries[name] for name in free}, free, entries)
        return {name: counts[name] + grown[name] for name in counts}
    ranked = [score.index_fill(0, score.argmax(), math.inf) for score in scores.values()]
    lengths = torch.tensor([len(score) for score in ranked])
    owner = torch.repeat_interleave(torch.arange(len(ranked)), lengths)
    sizes = torch.tensor([entries[name] for name in scores])
    stay = _highest_within(torch.cat(ranked), sizes[owner], max(total, sum(entries.values()))).cpu()
    return dict(zip(scores, torch.bincount(owner[stay], minlength=len(ranked)).tolist(), strict=True))


def _highest_within(scores: torch.Tensor, sizes: torch.Tensor, budget: int) -> torch.Tensor:
    """From the highest score down, each whose size fits into what is left of `budget`; ties to the lower position."""
    smallest, largest = int(sizes.min()), int(sizes.max())
    if smallest == largest:
        return select_highest(scores, budget // largest)
    order = scores.sort(descending=True, stable=True).indices.cpu()
    chosen = []
    while budget >= smallest and len(order):
        order = order[sizes[order] <= budget]
        within = sizes[order].cumsum(0) <= budget
        chosen.append(order[within])
        budget -= int(sizes[chosen[-1]].sum())
        order = order[~within]
    return torch.cat(chosen)


def allocate_by_momentum(layers: Layers, total: int, pruning_ratio: float, readmit: bool) -> dict[str, int]:
    """
    Active blocks of each layer if each gives up those that it replaces and what makes up `total` active entries is
    shared out in proportion to the layers' mean gradient momentum (SNFS, arXiv:1907.04840, section 3). If that gives
    up too little, all give up more, in proportion to what they have left.
    """
    entries = _block_entries(layers)
    left = {
        name: max(1, layer.nnzb - replaced_count(pruning_ratio, layer.nnzb, layer.num_blocks, readmit))
        for name, layer in layers.items()
    }
    missing = total - count_entries(layers, left)
    if missing < 0:
        spare = {name: left[name] - 1 for name in left}
        less = share_out(-missing, {name: left[name] * entries[name] for name in left}, spare, entries)
        return {name: left[name] - less[name] for name in left}
    weights = {name: mean_momentum(layer) for name, layer in layers.items()}
    reached = left
    # Into what is free besides the blocks just given up; a model that is to be fuller than that gives up fewer.
    for barred in (0 if readmit else 1, 0):
        free = {
            name: layer.num_blocks - reached[name] - barred * (layer.nnzb - left[name])
            for name, layer in layers.items()
        }
        grown = share_out(total - count_entries(layers, reached), weights, free, entries)
        reached = {name: reached[name] + grown[name] for name in reached}
    return reached


def share_out(
    total: int, weights: Mapping[str, float], limits: Mapping[str, int], entries: Mapping[str, int]
) -> dict[str, int]:
    """
    Whole numbers of blocks, none above its limit, whose entries add up to `total` in proportion to `weights`: largest
    remainders first, ties to the earlier. What a limit cuts off goes to the others; what is too little for a block is
    left over.

    Args:
        entries (`Mapping[str, int]`): in one block.
    """
    shares, rest = dict.fromkeys(weights, 0), total
    while True:
        room = [name for name in weights if shares[name] < limits[name] and entries[name] <= rest]
        if not room:
            return shares
        sum_of_weights = sum(weights[name] for name in room)
        exact = {
            name: rest * (weights[name] / sum_of_weights if sum_of_weights else 1 / len(room)) / entries[name]
            for name in room
        }
        whole = {name: min(limits[name] - shares[name], math.floor(exact[name])) for name in room}
        if not any(whole.values()):
            left = rest
            for name in sorted(room, key=lambda name: -exact[name]):
                if entries[name] <= left:
                    whole[name] = 1
                    left -= entries[name]
        for name, count in whole.items():
            shares[name] += count
            rest -= count * entries[name]


def largest_block(layers: Layers) -> int:
    """Entries of the largest block of `layers`."""
    return max(_block_entries(layers).values())


def _block_entries(layers: Layers) -> dict[str, int]:
    return {name: math.prod(layer.block_shape) for name, layer in layers.items()}

"""How many active blocks each layer is to have: as scheduled for each, or a total shared out by what they hold."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .counts import Layers, block_entries, count_entries, replaced_count
from .records import mean_momentum
from .scores import select_highest


if TYPE_CHECKING:
    from .context import UpdateContext


@dataclass(frozen=True)
class Allocation:
    """
    How the active blocks of a model are shared out between its layers.

    Args:
        targets (`Callable[[UpdateContext], dict[str, int]]`): active blocks of each layer after an update.
        needs (`frozenset[str]`): statistics and records that it looks at; see [`Method`].
        shrink_counts (`bool`): whether what a layer loses to others counts as replaced, instead of being pruned beside
            it.
    """

    targets: "Callable[[UpdateContext], dict[str, int]]"
    needs: frozenset[str] = frozenset()
    shrink_counts: bool = False


def allocate_globally(layers: Layers, total: int, scores: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """
    Active blocks of each layer if those with the highest scores of all layers stay, up to `total` active entries and
    at least one block in each; a model with fewer grows in proportion to the free positions.

    Args:
        scores (`Mapping[str, torch.Tensor]`): of the active blocks of each layer, of shape `(nnzb,)`.
    """
    counts, entries = {name: layer.nnzb for name, layer in layers.items()}, block_entries(layers)
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
    entries = block_entries(layers)
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


ALLOCATIONS: dict[str, Allocation] = {
    # As scheduled for each layer.
    "layer": Allocation(lambda update: dict(update.scheduled)),
    # Those of the highest prune scores of all layers stay (GraNet).
    "global": Allocation(lambda update: allocate_globally(update.layers, update.budget, update.mean_prune_scores())),
    # What is regrown is shared out by the mean gradient momentum of the layers: each prunes its share and regrows
    # another (SNFS).
    "momentum": Allocation(
        lambda update: allocate_by_momentum(
            update.layers, update.budget, update.pruning_ratio, update.settings.readmit
        ),
        frozenset({"momentum"}),
        shrink_counts=True,
    ),
}

"""Numbers of blocks and of their entries: how many an update replaces, and how many there are."""

import math
from collections.abc import Mapping

from ..nn.linear import BlockSparseLinear


Layers = Mapping[str, BlockSparseLinear]


def replaced_count(pruning_ratio: float, nnzb: int, num_blocks: int, readmit: bool = False) -> int:
    """
    Blocks that one update replaces: `floor(pr * nnzb + 1/2)`, at least one while `pr > 0`, at most the free positions
    (unless `readmit`, where pruned blocks are candidates too).
    """
    free = num_blocks - nnzb
    if pruning_ratio <= 0.0 or free == 0:
        return 0
    count = max(1, math.floor(pruning_ratio * nnzb + 0.5))
    return count if readmit else min(count, free)


def pruned_count(
    pruning_ratio: float, nnzb: int, num_blocks: int, target: int, readmit: bool = False, shrink_counts: bool = False
) -> int:
    """
    Blocks that one update prunes to come from `nnzb` to `target` active ones; it then regrows `target - nnzb` more.

    Args:
        shrink_counts (`bool`): whether those that a smaller density costs count as replaced (MST), instead of being
            pruned beside them.
    """
    shrink = max(0, nnzb - target)
    replaced = replaced_count(pruning_ratio, nnzb, num_blocks + shrink, readmit)  # what shrinks away makes room
    count = max(replaced, shrink) if shrink_counts else replaced + shrink
    return min(count, nnzb, nnzb if readmit else num_blocks - target)


def count_entries(layers: Layers, nnzb: Mapping[str, int]) -> int:
    """Active entries of `layers` with so many active blocks each."""
    return sum(nnzb[name] * entries for name, entries in block_entries(layers).items())


def largest_block(layers: Layers) -> int:
    """Entries of the largest block of `layers`."""
    return max(block_entries(layers).values())


def block_entries(layers: Layers) -> dict[str, int]:
    """Entries of one block of each layer."""
    return {name: math.prod(layer.block_shape) for name, layer in layers.items()}

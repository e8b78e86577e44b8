"""
The last values of pruned blocks, by which they can come back: new topologies are ranked on all that a layer ever
learned, as Prune Once for All does on a hidden dense weight (arXiv:2111.05754, section 3.1). The forward and backward
passes know nothing of it.
"""

import torch

from ..nn.linear import BlockSparseLinear
from .scores import SCORES, BlockStatistics, select_highest
from .update import Replacement, finite


def track_hidden_copy_(layer: BlockSparseLinear) -> None:
    """
    Begin to remember: adds the buffer `hidden_values` (of the dtype of the values, of shape `(block_rows *
    block_columns, rows, columns)`, zero), which checkpoints keep and finished models do not.
    """
    values = layer.values.detach()
    layer.register_buffer("hidden_values", values.new_zeros(layer.num_blocks, *layer.block_shape))


def untrack_hidden_copy_(layer: BlockSparseLinear) -> None:
    """Take the buffer away, if it is there."""
    layer._buffers.pop("hidden_values", None)


def has_hidden_copy(layer: BlockSparseLinear) -> bool:
    """Whether `track_hidden_copy_` was called on this layer."""
    return "hidden_values" in layer._buffers


@torch.no_grad()
def remember_(layer: BlockSparseLinear, slots: torch.Tensor) -> None:
    """Keep the values of the blocks in `slots` (`torch.int64` of shape `(count,)`), which are about to be pruned."""
    layer.get_buffer("hidden_values")[layer.block_index[slots].long()] = layer.values[slots]


@torch.no_grad()
def choose_by_hidden_copy(layer: BlockSparseLinear, prune_score: str, nnzb: int) -> Replacement:
    """
    What leaves and what returns if the `nnzb` blocks of highest score, by active and by remembered values, are to be
    active; changes nothing. A block that was never active counts as zero; ties go to active blocks.

    Args:
        prune_score (`str`): a key of `SCORES` that needs values alone.

    Raises:
        FloatingPointError: if a score is not finite.
    """
    index, hidden = layer.block_index.long(), layer.get_buffer("hidden_values")
    is_inactive = torch.ones(layer.num_blocks, dtype=torch.bool, device=index.device)
    is_inactive[index] = False
    inactive = is_inactive.nonzero().squeeze(1)
    values = torch.cat([layer.values.detach(), hidden[inactive]])  # [all blocks, rows, columns], active ones first
    statistics = BlockStatistics(len(values), torch.Generator(), values.device, values=values)
    scores = finite(SCORES[prune_score].function(statistics), "prune_score", prune_score)
    chosen = torch.zeros(len(values), dtype=torch.bool, device=index.device)
    chosen[select_highest(scores, nnzb)] = True
    returning = inactive[chosen[layer.nnzb :]]
    return Replacement((~chosen[: layer.nnzb]).nonzero().squeeze(1), returning, hidden[returning])

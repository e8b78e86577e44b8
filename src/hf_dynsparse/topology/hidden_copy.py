"""
The last values of pruned blocks, by which they can come back: new topologies are ranked on all that a layer ever
learned, as Prune Once for All does on a hidden dense weight (arXiv:2111.05754, section 3.1). The forward and backward
passes know nothing of it.
"""

from typing import TYPE_CHECKING

import torch

from .scores import SCORES, BlockStatistics, select_highest
from .update import Replacement, finite


if TYPE_CHECKING:
    from .context import UpdateContext


@torch.no_grad()
def choose_by_hidden_copy(update: "UpdateContext", name: str, nnzb: int) -> Replacement:
    """
    What leaves and what returns if the `nnzb` blocks of highest prune score, by active and by remembered values, are
    to be active; changes nothing. A block that was never active counts as zero; ties go to active blocks.

    Raises:
        FloatingPointError: if a score is not finite.
    """
    layer, prune_score = update.layers[name], update.settings.prune_score
    index, hidden = layer.block_index.long(), layer.get_buffer("hidden_values")
    is_inactive = torch.ones(layer.num_blocks, dtype=torch.bool, device=index.device)
    is_inactive[index] = False
    inactive = is_inactive.nonzero().squeeze(1)
    values = torch.cat([layer.values.detach(), hidden[inactive]])  # [all blocks, rows, columns], active ones first
    statistics = BlockStatistics(len(values), torch.Generator(), values.device, values=values)
    scores = finite(SCORES[prune_score](statistics), "prune_score", prune_score)
    chosen = torch.zeros(len(values), dtype=torch.bool, device=index.device)
    chosen[select_highest(scores, nnzb)] = True
    returning = inactive[chosen[layer.nnzb :]]
    return Replacement((~chosen[: layer.nnzb]).nonzero().squeeze(1), returning, hidden[returning])

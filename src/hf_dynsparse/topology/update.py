"""One topology update of one layer: prune the blocks with the lowest scores, regrow as many elsewhere."""

import math
from dataclasses import dataclass

import torch

from ..nn import BlockSparseLinear
from ..optim import clear_moments_
from .exploration import count_newborn, ever_active, is_tracked, record_active_
from .scores import PRUNE_SCORES, REGROW_RULES, BlockStatistics, resolve_score


@dataclass(frozen=True)
class LayerUpdate:
    """
    What an update did to one layer.

    Args:
        removed (`int`): blocks that left the topology; as many are new.
        newborn_removed (`int`): how many of them the update just before had activated.
    """

    removed: int
    newborn_removed: int


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


def select_highest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """
    Positions of the `count` highest scores in ascending order, ties to the lower position: `torch.int64` of shape
    `(count,)`.
    """
    if count == 0:
        return torch.empty(0, dtype=torch.int64, device=scores.device)
    size = scores.numel()
    candidates = None
    if size > 1 << 16 and count < size // 4:
        # Most positions of a large tensor cannot win: a sample gives a threshold below the winners. Checked, so exact.
        sample = scores[:: size >> 13]
        bound = sample.sort().values[max(0, sample.numel() - 1 - math.ceil(1.25 * sample.numel() * count / size + 32))]
        candidates = (scores >= bound).nonzero().squeeze(1)
        if candidates.numel() < count:
            candidates = None
    pool = scores if candidates is None else scores[candidates]
    threshold = pool.kthvalue(pool.numel() - count + 1).values
    chosen = pool > threshold
    ties = (pool == threshold).nonzero().squeeze(1)
    chosen[ties[: count - int(chosen.sum())]] = True
    chosen = chosen.nonzero().squeeze(1)
    return chosen if candidates is None else candidates[chosen]


@torch.no_grad()
def prune_regrow_(
    layer: BlockSparseLinear,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    pruning_ratio: float,
    prune_score: str = "l1",
    regrow_rule: str = "random",
    readmit: bool = False,
    generator: torch.Generator | None = None,
    dense_gradient: torch.Tensor | None = None,
    update: int = 0,
) -> LayerUpdate:
    """
    Replace a share of the active blocks of `layer`, in place (arXiv:2108.06277, section 3).

    A new block takes the slot of a pruned one; its values and all its moments are zero. Survivors are not touched.

    Args:
        layer (`BlockSparseLinear`): the layer.
        optimizer (`torch.optim.Optimizer`, *optional*): where the moments of `layer.values` are.
        pruning_ratio (`float`): share of active blocks to replace, in [0, 1].
        prune_score, regrow_rule (`str`): keys of `SCORES`; the lowest scores are pruned, the highest regrown.
        readmit (`bool`): whether a block pruned in this update may return in it (RigL); it then keeps values and
            moments.
        generator (`torch.Generator`, *optional*): on the CPU. Default: seeded with 0.
        dense_gradient (`torch.Tensor` of shape `(block_rows * block_columns, rows, columns)`, *optional*): for scores
            that need it.
        update (`int`): number of this update in the run, for the ages of blocks.

    Raises:
        ValueError: for an unknown score or rule, or a statistic that is needed and missing.
        FloatingPointError: if a score is not finite; nothing is changed then.
        TypeError: for optimiser state that cannot be told apart by block; nothing is changed then.
    """
    prune = resolve_score(prune_score, "prune_score", PRUNE_SCORES)
    regrow = resolve_score(regrow_rule, "regrow_rule", REGROW_RULES)
    count = replaced_count(pruning_ratio, layer.nnzb, layer.num_blocks, readmit)
    if count == 0:
        return LayerUpdate(0, 0)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    device, index = layer.values.device, layer.block_index.long()

    of_slots = prune.function(
        BlockStatistics(
            layer.nnzb,
            generator,
            device,
            values=layer.values,
            gradient=dense_gradient[index] if dense_gradient is not None and "gradient" in prune.needs else None,
        )
    )
    pruned = select_highest(-_finite(of_slots, "prune_score", prune_score), count)

    of_positions = regrow.function(
        BlockStatistics(
            layer.num_blocks,
            generator,
            device,
            gradient=dense_gradient,
            ever_active=ever_active(layer) if "ever_active" in regrow.needs else None,
        )
    )
    barred = index.clone()
    if readmit:
        barred = barred[_others(pruned, layer.nnzb)]
    candidates = _finite(of_positions, "regrow_rule", regrow_rule).index_fill(0, barred, -math.inf)
    regrown = select_highest(candidates, count)

    if readmit:
        back = torch.isin(regrown, index[pruned])
        returned = torch.isin(index[pruned], regrown[back])
        regrown, pruned = regrown[~back], pruned[~returned]

    if optimizer is not None:
        clear_moments_(optimizer, layer.values, pruned)
    tracked = is_tracked(layer)
    newborn = count_newborn(layer, pruned, update) if tracked and update else 0
    layer.values[pruned] = 0
    layer.block_index[pruned] = regrown.to(torch.int32)
    if tracked:
        record_active_(layer, regrown, pruned, update + 1)
    return LayerUpdate(pruned.numel(), newborn)


def _others(slots: torch.Tensor, nnzb: int) -> torch.Tensor:
    """The slots that are not in `slots`."""
    kept = torch.ones(nnzb, dtype=torch.bool, device=slots.device)
    kept[slots] = False
    return kept.nonzero().squeeze(1)


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no entry is NaN or infinite: by the sum, which either of them spoils, at a tenth of the cost."""
    return bool(torch.isfinite(tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32))))


def _finite(scores: torch.Tensor, argument: str, name: str) -> torch.Tensor:
    if not is_finite(scores):
        raise FloatingPointError(f"`{argument}` {name!r} gave a score that is not finite")
    return scores

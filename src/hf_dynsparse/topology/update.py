"""One topology update of one layer: prune the blocks with the lowest scores, regrow as many elsewhere."""

import math
from dataclasses import dataclass

import torch

from ..nn import BlockSparseLinear
from ..optim import clear_moments_
from ..shards import gather_rows, local_rows, whole, zero_rows_
from .exploration import count_newborn, ever_active, is_tracked, record_active_
from .scores import PRUNE_SCORES, REGROW_RULES, BlockStatistics, Score, resolve_score


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


@dataclass(frozen=True)
class Replacement:
    """
    What an update is about to do to one layer.

    Args:
        slots (`torch.Tensor` of shape `(count,)`, `torch.int64`): slots whose blocks leave the topology.
        block_ids (`torch.Tensor` of shape `(count,)`, `torch.int64`): blocks that take these slots.
    """

    slots: torch.Tensor
    block_ids: torch.Tensor


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
        update (`int`): number of this update in the run, for the ages of blocks.
        pruning_ratio, prune_score, regrow_rule, readmit, generator, dense_gradient: see `choose_replacement`.

    Raises:
        TypeError: for optimiser state that cannot be told apart by block; nothing is changed then.
        ValueError, FloatingPointError: see `choose_replacement`; nothing is changed then.
    """
    replacement = choose_replacement(
        layer,
        pruning_ratio=pruning_ratio,
        prune_score=prune_score,
        regrow_rule=regrow_rule,
        readmit=readmit,
        generator=generator,
        dense_gradient=dense_gradient,
    )
    return replace_blocks_(layer, replacement, optimizer, update)


@torch.no_grad()
def choose_replacement(
    layer: BlockSparseLinear,
    *,
    pruning_ratio: float,
    prune_score: str = "l1",
    regrow_rule: str = "random",
    readmit: bool = False,
    generator: torch.Generator | None = None,
    dense_gradient: torch.Tensor | None = None,
) -> Replacement:
    """
    Choose which blocks of `layer` to prune and which to regrow; changes nothing.

    Args:
        pruning_ratio (`float`): share of active blocks to replace, in [0, 1].
        prune_score, regrow_rule (`str`): keys of `SCORES`; the lowest scores are pruned, the highest regrown.
        readmit (`bool`): whether a block pruned in this update may return in it (RigL); it then keeps values and
            moments.
        generator (`torch.Generator`, *optional*): on the CPU. Default: seeded with 0.
        dense_gradient (`torch.Tensor` of shape `(block_rows * block_columns, rows, columns)`, *optional*): for scores
            that need it.

    Raises:
        ValueError: for an unknown score or rule, or a dense gradient that is needed and missing.
        FloatingPointError: if a score is not finite.
    """
    prune = resolve_score(prune_score, "prune_score", PRUNE_SCORES)
    regrow = resolve_score(regrow_rule, "regrow_rule", REGROW_RULES)
    index = layer.block_index.long()
    count = replaced_count(pruning_ratio, layer.nnzb, layer.num_blocks, readmit)
    if count == 0:
        nothing = index[:0]
        return Replacement(nothing, nothing)
    if dense_gradient is None and "gradient" in prune.needs | regrow.needs:
        raise ValueError(
            f"prune_score={prune_score!r} with regrow_rule={regrow_rule!r} needs `dense_gradient`. Got none: pass the "
            "gradient of every position, or use `TopologyUpdater`, which collects it."
        )
    generator = torch.Generator().manual_seed(0) if generator is None else generator

    of_slots = _score_slots(layer, prune, generator, dense_gradient)
    pruned = select_highest(-_finite(of_slots, "prune_score", prune_score), count)

    of_positions = regrow.function(
        BlockStatistics(
            layer.num_blocks,
            generator,
            index.device,
            gradient=dense_gradient,
            ever_active=ever_active(layer) if "ever_active" in regrow.needs else None,
        )
    )
    barred = index[_others(pruned, layer.nnzb)] if readmit else index
    candidates = _finite(of_positions, "regrow_rule", regrow_rule).index_fill(0, barred, -math.inf)
    regrown = select_highest(candidates, count)
    if readmit:
        stays = torch.isin(index[pruned], regrown)
        regrown, pruned = regrown[~torch.isin(regrown, index[pruned])], pruned[~stays]
    return Replacement(pruned, regrown)


@torch.no_grad()
def replace_blocks_(
    layer: BlockSparseLinear, replacement: Replacement, optimizer: torch.optim.Optimizer | None = None, update: int = 0
) -> LayerUpdate:
    """
    Put the new blocks into the slots of the pruned ones, in place: values and every moment zero.

    Raises:
        TypeError: for optimiser state that cannot be told apart by block; nothing is changed then.
    """
    slots, block_ids = replacement.slots, replacement.block_ids
    if optimizer is not None:
        clear_moments_(optimizer, layer.values, slots)
    zero_rows_(layer.values, slots)
    layer.block_index[slots] = block_ids.to(torch.int32)
    newborn = 0
    if is_tracked(layer):
        newborn = count_newborn(layer, slots, update) if update else 0
        record_active_(layer, block_ids, slots, update + 1)
    return LayerUpdate(slots.numel(), newborn)


def _score_slots(
    layer: BlockSparseLinear, score: Score, generator: torch.Generator, dense_gradient: torch.Tensor | None
) -> torch.Tensor:
    """The scores of all slots, of shape `(nnzb,)`; those that need values come from the ranks that hold them."""
    index = layer.block_index.long()
    values = None
    if "values" in score.needs:
        values, first = local_rows(layer.values)
        index = index[first : first + len(values)]
    scores = score.function(
        BlockStatistics(
            len(index),
            generator,
            index.device if values is None else values.device,
            values=values,
            gradient=dense_gradient[index] if dense_gradient is not None and "gradient" in score.needs else None,
        )
    )
    return scores if values is None else gather_rows(scores, layer.values).to(index.device)


def _others(slots: torch.Tensor, nnzb: int) -> torch.Tensor:
    """The slots that are not in `slots`."""
    kept = torch.ones(nnzb, dtype=torch.bool, device=slots.device)
    kept[slots] = False
    return kept.nonzero().squeeze(1)


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no entry is NaN or infinite: by the sum, which either of them spoils, at a tenth of the cost."""
    return bool(torch.isfinite(whole(tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32)))))


def _finite(scores: torch.Tensor, argument: str, name: str) -> torch.Tensor:
    if not is_finite(scores):
        raise FloatingPointError(f"`{argument}` {name!r} gave a score that is not finite")
    return scores

"""One topology update of one layer: prune the blocks with the lowest scores, regrow as many elsewhere."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..nn.linear import BlockSparseLinear
from ..nn.shards import gather_rows, local_rows, whole, write_rows_
from ..optim.moments import clear_moments_
from ..optim.second_moment import second_moment
from .counts import pruned_count
from .exploration import count_newborn, ever_active, is_tracked, newborn_slots, record_active_
from .records import RECORDED, after_update_, recorded, records_of
from .resize import resize_
from .scores import OBSERVED, SCORES, BlockStatistics, Score, select_highest, select_lowest
from .settings import TopologySettings, as_settings


@dataclass(frozen=True)
class LayerUpdate:
    """
    What an update did to one layer.

    Args:
        removed (`int`): blocks that left the topology; as many are new, unless the density has changed.
        newborn_removed (`int`): how many of them the update just before had activated.
        newborn (`int`): how many blocks that update had activated.
    """

    removed: int
    newborn_removed: int
    newborn: int = 0


@dataclass(frozen=True)
class Replacement:
    """
    What an update is about to do to one layer.

    Args:
        slots (`torch.Tensor` of shape `(removed,)`, `torch.int64`): slots, ascending, whose blocks leave the
            topology.
        block_ids (`torch.Tensor` of shape `(added,)`, `torch.int64`): blocks that are new: the first take these slots.
        values (`torch.Tensor` of shape `(added, rows, columns)`, *optional*): what they start with. Default: zero.
    """

    slots: torch.Tensor
    block_ids: torch.Tensor
    values: torch.Tensor | None = None


@torch.no_grad()
def prune_regrow_(
    layer: BlockSparseLinear,
    optimizer: torch.optim.Optimizer | None = None,
    settings: TopologySettings | None = None,
    *,
    generator: torch.Generator | None = None,
    dense_gradient: torch.Tensor | None = None,
    observed: Mapping[str, torch.Tensor] | None = None,
    nnzb: int | None = None,
    update: int = 0,
    **options: Any,
) -> LayerUpdate:
    """
    Replace a share of the active blocks of `layer`, in place (arXiv:2108.06277, section 3).

    A new block takes the slot of a pruned one; its moments are zero, and so are its values unless `regrow_std` says
    otherwise. Survivors are not touched. If `nnzb` asks for another number of blocks, slots left over are taken out,
    and missing ones appended.

    Args:
        layer (`BlockSparseLinear`): the layer.
        optimizer (`torch.optim.Optimizer`, *optional*): where the moments of `layer.values` are. A score of the
            second moment needs it.
        settings, options: see [`TopologySettings`]: `pruning_ratio`, `prune_score`, `regrow_rule`, `readmit`,
            `prune_min_age`, `regrow_std` and `shrink_counts` are those that matter here.
        generator (`torch.Generator`, *optional*): on the CPU. Default: seeded with 0.
        dense_gradient (`torch.Tensor` of shape `(block_rows * block_columns, rows, columns)`, *optional*): for scores
            that need it.
        observed (`Mapping[str, torch.Tensor]`, *optional*): other fields of `BlockStatistics` that scores need, of
            every position: "input_scale", "output_scale", "momentum".
        nnzb (`int`, *optional*): active blocks after the update. Default: as many as before.
        update (`int`): number of this update in the run, for the ages of blocks.

    Raises:
        TypeError: for optimiser state that cannot be told apart by block; nothing is changed then.
        ValueError, FloatingPointError: see `choose_replacement`; nothing is changed then.
    """
    settings = as_settings(settings, options)
    replacement = choose_replacement(
        layer,
        settings,
        settings.pruning_ratio,
        layer.nnzb if nnzb is None else nnzb,
        generator or torch.Generator().manual_seed(0),
        {**(observed or {}), **({} if dense_gradient is None else {"gradient": dense_gradient})},
        held_moments(layer, settings, optimizer),
    )
    layer.given_nnzb = layer.given_nnzb if nnzb is None else None  # decided by hand
    return replace_blocks_(layer, replacement, optimizer, update)


@torch.no_grad()
def choose_replacement(
    layer: BlockSparseLinear,
    settings: TopologySettings,
    pruning_ratio: float,
    nnzb: int,
    generator: torch.Generator,
    observed: Mapping[str, torch.Tensor],
    held: Mapping[str, torch.Tensor],
) -> Replacement:
    """
    Choose which blocks of `layer` to prune and which to regrow; changes nothing. The lowest prune scores go, the
    highest regrow scores come. With `readmit` a block that would do both keeps values and moments.

    Args:
        pruning_ratio (`float`): share of active blocks to replace, in [0, 1].
        nnzb (`int`): active blocks after the update.
        generator (`torch.Generator`): on the CPU.
        observed (`Mapping[str, torch.Tensor]`): the fields of `BlockStatistics` in `OBSERVED` that scores need, of
            every position.
        held (`Mapping[str, torch.Tensor]`): those that an optimiser keeps, of the blocks on this rank;
            see `held_moments`.

    Raises:
        ValueError: for a statistic that is needed and missing.
        FloatingPointError: if a score is not finite.
    """
    index = layer.block_index.long()
    readmit, regrow_std = settings.readmit, settings.regrow_std
    removed = pruned_count(pruning_ratio, layer.nnzb, layer.num_blocks, nnzb, readmit, settings.shrinking_replaces)
    added = nnzb - layer.nnzb + removed
    pruned = regrown = index[:0]
    if not removed and not added:
        return Replacement(pruned, regrown)
    _check_observed(settings, observed)

    if removed:
        of_slots = score_slots(layer, SCORES[settings.prune_score], generator, observed, held)
        spared = newborn_slots(layer, settings.prune_min_age) if settings.prune_min_age else None
        pruned = select_lowest(finite(of_slots, "prune_score", settings.prune_score), removed, spared)

    if added:
        occupied = index[_others(pruned, layer.nnzb)]
        barred = occupied if readmit else index
        rule = SCORES[settings.regrow_rule]
        of_positions = _score_positions(layer, rule, generator, observed, occupied, barred, added)
        candidates = finite(of_positions, "regrow_rule", settings.regrow_rule).index_fill(0, barred, -math.inf)
        regrown = select_highest(candidates, added)
    if readmit:
        stays = torch.isin(index[pruned], regrown)
        regrown, pruned = regrown[~torch.isin(regrown, index[pruned])], pruned[~stays]
    values = torch.randn(len(regrown), *layer.block_shape, generator=generator) * regrow_std if regrow_std else None
    return Replacement(pruned, regrown, values)


@torch.no_grad()
def replace_blocks_(
    layer: BlockSparseLinear, replacement: Replacement, optimizer: torch.optim.Optimizer | None = None, update: int = 0
) -> LayerUpdate:
    """
    Put the new blocks into the slots of the pruned ones, in place: values as chosen, every moment zero.

    Raises:
        TypeError: for optimiser state that cannot be told apart by block; nothing is changed then.
    """
    removed, block_ids = replacement.slots, replacement.block_ids
    reused = min(len(removed), len(block_ids))
    newborn_removed = newborn = 0
    if update and is_tracked(layer):
        newborn_removed, newborn = count_newborn(layer, update, removed), count_newborn(layer, update)
    slots = removed[:reused]
    if optimizer is not None:
        clear_moments_(optimizer, layer.values, slots)
    for record in records_of(layer):
        if record.before_update is not None:
            record.before_update(layer, removed)
    layer.block_index[slots] = block_ids[:reused].to(torch.int32)
    if len(removed) != len(block_ids):
        # Slots ascend: those that are taken out come after the reused ones, which keep their places.
        resize_(layer, removed[reused:], block_ids[reused:], optimizer=optimizer)
        appended = torch.arange(layer.nnzb - (len(block_ids) - reused), layer.nnzb, device=slots.device)
        slots = torch.cat([slots, appended])
    values = 0.0 if replacement.values is None else replacement.values
    write_rows_(layer.values, slots, values)
    after_update_(layer, slots, values)
    if is_tracked(layer):
        record_active_(layer, block_ids, slots, update + 1)
    return LayerUpdate(len(removed), newborn_removed, newborn)


def held_moments(
    layer: BlockSparseLinear,
    settings: TopologySettings,
    optimizer: torch.optim.Optimizer | None,
    ages: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """
    The fields of `BlockStatistics` that scores need of the optimiser, of the blocks on this rank.

    Raises:
        ValueError: if there is none, or it does not have them; see `check_second_moment`.
    """
    if "second_moment" not in settings.needs:
        return {}
    if optimizer is None:
        raise ValueError(
            f"prune_score={settings.prune_score!r} looks at the second moment. Got no optimizer: pass the one that "
            "trains the layer."
        )
    return {"second_moment": second_moment(optimizer, layer.values, ages)}


def score_slots(
    layer: BlockSparseLinear,
    score: Score,
    generator: torch.Generator,
    observed: Mapping[str, torch.Tensor],
    held: Mapping[str, torch.Tensor],
) -> torch.Tensor:
    """
    The scores of all slots, of shape `(nnzb,)`; those that need values or moments come from the ranks that hold them.
    """
    index = layer.block_index.long()
    first, device, fields = 0, index.device, dict[str, Any]()
    is_held = not score.needs.isdisjoint({"values", *held})
    if is_held:
        values, first = local_rows(layer.values)
        device, index = values.device, index[first : first + len(values)]
        fields = {name: rows for name, rows in {"values": values, **held}.items() if name in score.needs}
    fields |= {name: observed[name][index] for name in score.needs & observed.keys()}
    if "newborn" in score.needs:
        fields["newborn"] = newborn_slots(layer)[first : first + len(index)].to(device)
    for name in score.needs & RECORDED:
        fields[name] = recorded(layer, name)[first : first + len(index)].to(device)
    scores = score(BlockStatistics(len(index), generator, device, **fields))
    return gather_rows(scores, layer.values).to(index.device) if is_held else scores


def _score_positions(
    layer: BlockSparseLinear,
    score: Score,
    generator: torch.Generator,
    observed: Mapping[str, torch.Tensor],
    occupied: torch.Tensor,
    barred: torch.Tensor,
    wanted: int,
) -> torch.Tensor:
    """
    The scores of all positions, of shape `(blocks,)`, of which `wanted` will be regrown: at none of `barred`, beside
    the blocks that stay, `occupied`.
    """
    fields: dict[str, Any] = {name: observed[name] for name in score.needs & observed.keys()}
    if "ever_active" in score.needs:
        fields["ever_active"] = ever_active(layer)
    for name, positions in (("occupied", occupied), ("barred", barred)):
        if name in score.needs:
            fields[name] = torch.zeros(layer.num_blocks, dtype=torch.bool, device=positions.device)
            fields[name] = fields[name].index_fill(0, positions, True).view(layer.grid)
    return score(BlockStatistics(layer.num_blocks, generator, occupied.device, wanted=wanted, **fields))


def _check_observed(settings: TopologySettings, observed: Mapping[str, torch.Tensor]) -> None:
    """Raises `ValueError` if a statistic that only training can collect is needed and missing."""
    needs = SCORES[settings.prune_score].needs | SCORES[settings.regrow_rule].needs
    missing = sorted((needs & OBSERVED) - observed.keys())
    if missing:
        names = ", ".join("`dense_gradient`" if name == "gradient" else f"`observed[{name!r}]`" for name in missing)
        raise ValueError(
            f"prune_score={settings.prune_score!r} with regrow_rule={settings.regrow_rule!r} needs {names}. Got none: "
            "pass it for every position, or use `TopologyUpdater`, which collects it."
        )


def _others(slots: torch.Tensor, nnzb: int) -> torch.Tensor:
    """The slots that are not in `slots`."""
    kept = torch.ones(nnzb, dtype=torch.bool, device=slots.device)
    kept[slots] = False
    return kept.nonzero().squeeze(1)


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no entry is NaN or infinite: by the sum, which either of them spoils, at a tenth of the cost."""
    return bool(torch.isfinite(whole(tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32)))))


def finite(scores: torch.Tensor, argument: str, name: str) -> torch.Tensor:
    """
    The scores as they are.

    Raises:
        FloatingPointError: if one is not finite; `argument` and `name` say which rule gave it.
    """
    if not is_finite(scores):
        raise FloatingPointError(f"`{argument}` {name!r} gave a score that is not finite")
    return scores

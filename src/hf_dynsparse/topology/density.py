"""The density of a model that changes over a run: how many blocks each layer is to have, and where that cannot be."""

import math
from collections.abc import Mapping

from torch.distributed.tensor import DTensor

from ..layout import check_sparsity, count_active_blocks
from .allocation import ALLOCATIONS, Layers
from .schedules import density_share


def scheduled_blocks(
    layers: Layers, final: Mapping[str, int], initial_sparsity: float, share: float
) -> dict[str, int]:
    """
    Active blocks of each layer at a share of the way from the final density (0) to the initial one (1). On the way the
    sparsity of every layer is the same multiple of its final one, so that the whole model has what the schedule says.

    Args:
        final (`Mapping[str, int]`): active blocks of each layer at the end.
    """
    if share == 0.0:
        return dict(final)
    positions = sum(layer.in_features * layer.out_features for layer in layers.values())
    active = sum(final[name] * math.prod(layer.block_shape) for name, layer in layers.items())
    end = 1.0 - active / positions
    targets = {}
    for name, layer in layers.items():
        own = 1.0 - final[name] / layer.num_blocks
        begin = initial_sparsity * own / end if end else initial_sparsity
        targets[name] = count_active_blocks(layer.num_blocks, 1.0 - (own + (begin - own) * share))
    return targets


def changes_sizes(density_schedule: str, allocation: str) -> bool:
    """Whether updates change the numbers of active blocks of layers."""
    return density_schedule != "constant" or allocation != "layer"


def check_density(schedule: str, initial_sparsity: float, begin: float, end: float, allocation: str) -> None:
    """
    Raises:
        ValueError: for an unknown schedule or allocation, or a number out of range.
    """
    density_share(0.0, schedule, begin, end)
    check_sparsity(initial_sparsity)
    if allocation not in ALLOCATIONS:
        raise ValueError(f"`allocation` must be one of {', '.join(ALLOCATIONS)}. Got {allocation!r}.")


def check_sizes_may_change(layers: Layers, num_updates: int, what: str) -> None:
    """
    Raises:
        ValueError: for a run without updates, or layers that are split between ranks; `what` asks for the change.
    """
    if not num_updates:
        raise ValueError(
            f"The density changes in topology updates only. Got {what} in a run without updates. Ask for updates, or "
            "for a constant density."
        )
    if any(isinstance(layer.values, DTensor) for layer in layers.values()):
        raise ValueError(
            f"Layers that are split between ranks (FSDP2) cannot change their sizes. Got {what}. Use DDP, or a "
            "constant density."
        )

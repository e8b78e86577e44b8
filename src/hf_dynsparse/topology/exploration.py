"""
How much of the space of topologies a run has seen (arXiv:2108.06277, section 4): kept in buffers of the sparse layers
while they are trained, so that it survives save and resume; not part of a finished model.
"""

import math
from collections.abc import Iterable, Sequence

import torch

from ..nn.linear import BlockSparseLinear


_BITS = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8)
_ONES = torch.tensor([value.bit_count() for value in range(256)])


def is_tracked(layer: BlockSparseLinear) -> bool:
    """Whether the layer records its exploration; see `hf_dynsparse.topology.records`."""
    return "ever_active" in layer._buffers


def packed_map(layer: BlockSparseLinear) -> torch.Tensor:
    """
    The active blocks of the moment, one bit a position: `torch.uint8` of shape `(ceil(blocks / 8),)`.
    """
    packed = torch.zeros(-(-layer.num_blocks // 8), dtype=torch.uint8, device=layer.block_index.device)
    return _set_bits_(packed, layer.block_index.long())


def record_active_(layer: BlockSparseLinear, block_ids: torch.Tensor, slots: torch.Tensor, updates_done: int) -> None:
    """Record that the blocks `block_ids`, each at most once, became active in `slots`: both of shape `(count,)`."""
    _buffer(layer, "active_since")[slots] = updates_done
    _set_bits_(_buffer(layer, "ever_active"), block_ids.long())


def _set_bits_(packed: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    byte, bit = ids // 8, _BITS.to(ids.device)[ids % 8]
    unset = (packed[byte] & bit) == 0
    # Distinct unset bits of one byte add up to their union.
    return packed.index_put_((byte[unset],), bit[unset], accumulate=True)


def ever_active(layer: BlockSparseLinear) -> torch.Tensor:
    """Which positions were active at any time so far: `torch.bool` of shape `(block_rows * block_columns,)`."""
    packed = _buffer(layer, "ever_active")
    return ((packed[:, None] & _BITS.to(packed.device)) != 0).view(-1)[: layer.num_blocks]


def dof_coverage(layers: Iterable[BlockSparseLinear]) -> float:
    """
    Share of positions ever active, averaged over the tensors (arXiv:2108.06277, section 4). Starts at the density.
    """
    shares = []
    for layer in layers:
        packed = _buffer(layer, "ever_active")
        shares.append(int(_ONES.to(packed.device)[packed.long()].sum()) / layer.num_blocks)
    return sum(shares) / len(shares)


def count_newborn(layer: BlockSparseLinear, updates_done: int, slots: torch.Tensor | None = None) -> int:
    """How many of the blocks in `slots` (default: all) were activated by the last of `updates_done` updates."""
    since = _buffer(layer, "active_since")
    return int(((since if slots is None else since[slots]) == updates_done).sum())


def newborn_slots(layer: BlockSparseLinear, updates: int = 1) -> torch.Tensor:
    """Which slots hold a block of the last `updates`, `torch.bool` of shape `(nnzb,)`; none before the first."""
    since = _buffer(layer, "active_since")
    return (since > since.max() - updates) & (since > 0)


def block_ages(layer: BlockSparseLinear, updates_done: int) -> torch.Tensor:
    """How many topology updates each active block has survived: `torch.int32` of shape `(nnzb,)`."""
    return updates_done - _buffer(layer, "active_since")


def ages_in_steps(layer: BlockSparseLinear, steps: Sequence[int]) -> torch.Tensor:
    """
    How many optimiser steps each active block has taken, of shape `(nnzb,)`; infinitely many those that no update of
    this run has brought.

    Args:
        steps (`Sequence[int]`): the optimiser steps done at each update so far, and now.
    """
    since = _buffer(layer, "active_since").long()
    born = torch.tensor([-math.inf, *steps[:-1]], device=since.device)
    return steps[-1] - born[since.where(since < len(steps), 0)]


def _buffer(layer: BlockSparseLinear, name: str) -> torch.Tensor:
    buffer = layer._buffers.get(name)
    if buffer is None:
        raise ValueError(f"The layer does not record its exploration. Call `track_(layer)` first: {layer}")
    return buffer

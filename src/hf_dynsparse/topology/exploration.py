"""
How much of the space of topologies a run has seen (arXiv:2108.06277, section 4): kept in buffers of the sparse layers
while they are trained, so that it survives save and resume; not part of a finished model.
"""

from collections.abc import Iterable

import torch

from ..nn.linear import BlockSparseLinear
from .dense_gradient import DenseGradientProbe


# Share of the old mean that stays at each step (arXiv:1907.04840 takes the optimiser's, 0.9).
SMOOTHING = 0.9


_BITS = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8)
_ONES = torch.tensor([value.bit_count() for value in range(256)])


def track_exploration_(layer: BlockSparseLinear) -> None:
    """
    Begin to record: adds the buffers `ever_active` (`torch.uint8` of shape `(ceil(blocks / 8),)`, one bit a
    position) and `active_since` (`torch.int32` of shape `(nnzb,)`, the number of updates done when the block of this
    slot was activated). The active blocks of the moment are the start.
    """
    index = layer.block_index
    empty = torch.zeros(-(-layer.num_blocks // 8), dtype=torch.uint8, device=index.device)
    layer.register_buffer("ever_active", empty)
    layer.register_buffer("active_since", torch.zeros_like(index))
    record_active_(layer, index, torch.arange(layer.nnzb, device=index.device), 0)


def untrack_exploration_(layer: BlockSparseLinear) -> None:
    """Take the buffers of `track_exploration_` away, if they are there."""
    for name in ("ever_active", "active_since"):
        layer._buffers.pop(name, None)


def is_tracked(layer: BlockSparseLinear) -> bool:
    """Whether `track_exploration_` was called on this layer."""
    return "ever_active" in layer._buffers


def record_active_(layer: BlockSparseLinear, block_ids: torch.Tensor, slots: torch.Tensor, updates_done: int) -> None:
    """Record that the blocks `block_ids`, each at most once, became active in `slots`: both of shape `(count,)`."""
    _buffer(layer, "active_since")[slots] = updates_done
    packed = _buffer(layer, "ever_active")
    ids = block_ids.long()
    byte, bit = ids // 8, _BITS.to(ids.device)[ids % 8]
    unset = (packed[byte] & bit) == 0
    # Distinct unset bits of one byte add up to their union.
    packed.index_put_((byte[unset],), bit[unset], accumulate=True)


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


def count_newborn(layer: BlockSparseLinear, slots: torch.Tensor, updates_done: int) -> int:
    """How many of the blocks in `slots` were activated by the last of `updates_done` updates."""
    return int((_buffer(layer, "active_since")[slots] == updates_done).sum())


def newborn_slots(layer: BlockSparseLinear) -> torch.Tensor:
    """Which slots hold a block of the last update, `torch.bool` of shape `(nnzb,)`; none before the first."""
    since = _buffer(layer, "active_since")
    return (since == since.max()) & (since > 0)


def block_ages(layer: BlockSparseLinear, updates_done: int) -> torch.Tensor:
    """How many topology updates each active block has survived: `torch.int32` of shape `(nnzb,)`."""
    return updates_done - _buffer(layer, "active_since")


def _buffer(layer: BlockSparseLinear, name: str) -> torch.Tensor:
    buffer = layer._buffers.get(name)
    if buffer is None:
        raise ValueError(f"The layer does not record its exploration. Call `track_exploration_(layer)` first: {layer}")
    return buffer


def track_momentum_(layer: BlockSparseLinear) -> None:
    """
    Begin to average: adds the buffer `gradient_momentum` (`torch.float32` of shape `(block_rows * block_columns, rows,
    columns)`, zero), which checkpoints keep and finished models do not.
    """
    zeros = torch.zeros(layer.num_blocks, *layer.block_shape, device=layer.block_index.device)
    layer.register_buffer("gradient_momentum", zeros)


def untrack_momentum_(layer: BlockSparseLinear) -> None:
    """Take the buffer away, if it is there."""
    layer._buffers.pop("gradient_momentum", None)


def has_momentum(layer: BlockSparseLinear) -> bool:
    """Whether `track_momentum_` was called on this layer."""
    return "gradient_momentum" in layer._buffers


@torch.no_grad()
def add_to_momentum_(layer: BlockSparseLinear, probe: DenseGradientProbe) -> None:
    """Take in the gradient of one step."""
    layer.get_buffer("gradient_momentum").lerp_(probe.blocks(layer).float(), 1.0 - SMOOTHING)


def mean_momentum(layer: BlockSparseLinear) -> float:
    """Mean magnitude over the entries of active blocks."""
    return float(layer.get_buffer("gradient_momentum")[layer.block_index.long()].abs().mean(dtype=torch.float64))

"""The running mean of the dense gradient, for SNFS: dense memory and a dense product at every step."""

import torch

from ..nn import BlockSparseLinear
from .dense_gradient import DenseGradientProbe


# Share of the old mean that stays at each step (arXiv:1907.04840 takes the optimiser's, 0.9).
SMOOTHING = 0.9


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

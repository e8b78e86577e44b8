"""
More or fewer active blocks in a layer: real shapes, no padding. Every change of a size goes through `resize_`, which
knows what hangs on it.
"""

import torch

from ..nn.linear import BlockSparseLinear
from ..optim.moments import check_optimizer_state, new_moments
from .exploration import is_tracked, record_active_
from .records import after_update_, records_of


# Standard deviation of a normal distribution that is cut at two of its own.
_CUT_STD = 0.8796


@torch.no_grad()
def resize_(
    layer: BlockSparseLinear,
    removed: torch.Tensor,
    added: torch.Tensor,
    *,
    optimizer: torch.optim.Optimizer | None,
    values: torch.Tensor | None = None,
) -> None:
    """
    Take the slots `removed` out of `layer`, in place, and append one for each of the blocks `added`, with moments as
    the optimiser begins them. The other blocks keep their order, values and moments; `layer.values` stays the same
    parameter, and loses its gradient.

    Args:
        removed, added (`torch.Tensor` of shape `(count,)`, `torch.int64`).
        optimizer (`torch.optim.Optimizer` or `None`): whoever holds moments of `layer.values`; `None` says that nobody
            does.
        values (`torch.Tensor` of shape `(added, rows, columns)`, *optional*): of the new blocks. Default: zero.

    Raises:
        TypeError: for optimiser state that cannot be told apart by block; nothing is changed then.
        ValueError: for optimiser state of another size; nothing is changed then.
    """
    moments = [] if optimizer is None else check_optimizer_state(optimizer, layer.values)
    fresh = [] if optimizer is None else new_moments(optimizer, layer.values, len(added))
    kept = torch.ones(layer.nnzb, dtype=torch.bool, device=removed.device)
    kept[removed] = False
    values = layer.values.new_zeros(len(added), *layer.block_shape) if values is None else values.to(layer.values)
    # Whoever keeps an old loss, or DDP, keeps the node that adds up gradients of the old shape. PyTorch makes a new
    # one for a parameter whose dtype changes, and for that only.
    dtype = torch.float64 if layer.values.dtype != torch.float64 else torch.float32
    old, layer.values.data = layer.values.data, layer.values.new_empty(0, dtype=dtype)
    layer.values.grad, layer.values.data = None, old
    for tensor, new in zip((layer.values, *moments), (values, *fresh), strict=True):
        tensor.data = torch.cat([tensor.data[kept], new])
    layer.block_index = torch.cat([layer.block_index[kept], added.to(torch.int32)])
    for record in records_of(layer):
        if record.by_slot:
            rows = layer.get_buffer(record.buffer)
            setattr(layer, record.buffer, torch.cat([rows[kept], rows.new_zeros(len(added), *rows.shape[1:])]))


def set_size_(layer: BlockSparseLinear, nnzb: int, *, optimizer: torch.optim.Optimizer | None) -> None:
    """Give `layer` so many slots, in place; what they hold is to be loaded."""
    surplus = torch.arange(min(nnzb, layer.nnzb), layer.nnzb, device=layer.block_index.device)
    lacking = torch.zeros(max(0, nnzb - layer.nnzb), dtype=torch.int64, device=layer.block_index.device)
    resize_(layer, surplus, lacking, optimizer=optimizer)


@torch.no_grad()
def begin_at_size_(
    layer: BlockSparseLinear, nnzb: int, generator: torch.Generator, *, optimizer: torch.optim.Optimizer | None
) -> None:
    """
    Give a layer another number of active blocks before a run, in place: positions at random, values from a normal
    distribution cut at two standard deviations, as large as those that are there.
    """
    order = torch.randperm(layer.nnzb, generator=generator).to(layer.block_index.device)
    free = torch.ones(layer.num_blocks, dtype=torch.bool)
    free[layer.block_index.long().cpu()] = False
    places = free.nonzero().squeeze(1)
    chosen = places[torch.randperm(len(places), generator=generator)[: max(0, nnzb - layer.nnzb)]].sort().values
    std = float(layer.values.double().square().mean().sqrt()) / _CUT_STD
    fresh = torch.zeros(len(chosen), *layer.block_shape)
    if std:
        torch.nn.init.trunc_normal_(fresh, std=std, a=-2 * std, b=2 * std, generator=generator)
    resize_(layer, order[nnzb:], chosen.to(layer.block_index.device), optimizer=optimizer, values=fresh)
    if is_tracked(layer):
        new = torch.arange(layer.nnzb - len(chosen), layer.nnzb, device=layer.block_index.device)
        record_active_(layer, layer.block_index[new], new, 0)
        after_update_(layer, new, fresh)

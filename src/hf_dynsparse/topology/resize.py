"""More or fewer active blocks in a layer: real shapes, no padding."""

import torch

from ..nn import BlockSparseLinear
from ..optim import check_optimizer_state
from .exploration import is_tracked, record_active_


# Standard deviation of a normal distribution that is cut at two of its own.
_CUT_STD = 0.8796


@torch.no_grad()
def resize_(
    layer: BlockSparseLinear,
    removed: torch.Tensor,
    added: torch.Tensor,
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """
    Take the slots `removed` out of `layer`, in place, and append one for each of the blocks `added`, with values and
    moments of zero. The other blocks keep their order, values and moments; `layer.values` stays the same parameter.

    Args:
        removed, added (`torch.Tensor` of shape `(count,)`, `torch.int64`).

    Raises:
        TypeError: for optimiser state that cannot be told apart by block; nothing is changed then.
    """
    moments = [] if optimizer is None else check_optimizer_state(optimizer, layer.values)
    kept = torch.ones(layer.nnzb, dtype=torch.bool, device=removed.device)
    kept[removed] = False
    # Whoever keeps an old loss, or DDP, keeps the node that adds up gradients of the old shape. PyTorch makes a new
    # one for a parameter whose dtype changes, and for that only.
    dtype = torch.float64 if layer.values.dtype != torch.float64 else torch.float32
    old, layer.values.data = layer.values.data, layer.values.new_empty(0, dtype=dtype)
    layer.values.grad, layer.values.data = None, old
    for tensor in (layer.values, *moments):
        tensor.data = torch.cat([tensor.data[kept], tensor.new_zeros(len(added), *tensor.shape[1:])])
    layer.block_index = torch.cat([layer.block_index[kept], added.to(torch.int32)])
    if is_tracked(layer):
        ages = layer.get_buffer("active_since")
        layer.active_since = torch.cat([ages[kept], ages.new_zeros(len(added))])


def set_size_(layer: BlockSparseLinear, nnzb: int) -> None:
    """Give `layer` so many slots, in place; what they hold is to be loaded."""
    surplus = torch.arange(min(nnzb, layer.nnzb), layer.nnzb, device=layer.block_index.device)
    lacking = torch.zeros(max(0, nnzb - layer.nnzb), dtype=torch.int64, device=layer.block_index.device)
    resize_(layer, surplus, lacking)


@torch.no_grad()
def begin_at_size_(layer: BlockSparseLinear, nnzb: int, generator: torch.Generator) -> None:
    """
    Give a layer that was not trained yet another number of active blocks, in place: positions at random, values from a
    normal distribution cut at two standard deviations, as large as those that are there.
    """
    order = torch.randperm(layer.nnzb, generator=generator).to(layer.block_index.device)
    free = torch.ones(layer.num_blocks, dtype=torch.bool)
    free[layer.block_index.long().cpu()] = False
    places = free.nonzero().squeeze(1)
    chosen = places[torch.randperm(len(places), generator=generator)[: max(0, nnzb - layer.nnzb)]].sort().values
    std = float(layer.values.double().square().mean().sqrt()) / _CUT_STD
    fresh = torch.empty(len(chosen), *layer.block_shape)
    torch.nn.init.trunc_normal_(fresh, std=std, a=-2 * std, b=2 * std, generator=generator)
    resize_(layer, order[nnzb:], chosen.to(layer.block_index.device))
    new = torch.arange(layer.nnzb - len(chosen), layer.nnzb, device=layer.block_index.device)
    layer.values[new] = fresh.to(layer.values)
    if is_tracked(layer):
        record_active_(layer, layer.block_index[new], new, 0)

"""
Parameters whose rows lie on several ranks, as FSDP2 (`fully_shard`) keeps them: read one's own rows, write them, and
read all. Everything here takes plain tensors as well, all of whose rows are here.
"""

from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The rows of all ranks. Every rank must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_rows(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    """
    The rows that lie on this rank, none perhaps, in the memory of `tensor`; and the place of the first among all rows.

    Raises:
        ValueError: if another dimension than the first is split, or the first more than once.
    """
    if not isinstance(tensor, DTensor):
        return tensor.detach(), 0
    splits = [(dim, placement) for dim, placement in enumerate(tensor.placements) if not placement.is_replicate()]
    if len(splits) > 1 or any(not placement.is_shard(0) for _, placement in splits):
        raise ValueError(
            f"A parameter may be split between ranks by rows only. Got {tensor.placements} for shape "
            f"{tuple(tensor.shape)}. Shard it by `fully_shard` without a `shard_placement_fn`."
        )
    rows = tensor.to_local().detach()
    if not splits:
        return rows, 0
    dim = splits[0][0]
    per_rank = -(-len(tensor) // tensor.device_mesh.size(dim))
    return rows, min(len(tensor), per_rank * tensor.device_mesh.get_local_rank(dim))


def write_rows_(tensor: torch.Tensor, places: torch.Tensor, new: torch.Tensor | float) -> None:
    """
    Set the rows at `places` (`torch.int64` of shape `(count,)`) to a number, or to those of `new` (of shape
    `(count, ...)`, the same on every rank), each on the rank that holds it.
    """
    rows, first = local_rows(tensor)
    places = places.to(rows.device) - first
    here = (places >= 0) & (places < len(rows))
    rows[places[here]] = new.to(rows)[here] if isinstance(new, torch.Tensor) else new


def gather_rows(numbers: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """
    One number for every row of `like`, of shape `(rows,)`, from one for every local row. Every rank must call it.
    """
    if not isinstance(like, DTensor):
        return numbers
    shape = torch.Size([len(like)])
    return whole(DTensor.from_local(numbers, like.device_mesh, like.placements, shape=shape, stride=(1,)))


def shard_again_(model: nn.Module) -> None:
    """Split what a forward pass without a backward pass has left whole, so that `model` has its own parameters."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@torch.no_grad()
def load_whole_model_(model: nn.Module, saved: dict[str, torch.Tensor]) -> None:
    """Take over the tensors of a whole model that have a name in `model`; each rank reads its rows only."""
    shard_again_(model)
    for name, tensor in model.state_dict().items():
        if name in saved:
            rows, first = local_rows(tensor)
            rows.copy_(saved[name][first : first + len(rows)] if rows.dim() else saved[name])


def whole_optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """`optimizer.state_dict()` as a single process has it, on the CPU. Every rank must call it."""
    saved = optimizer.state_dict()
    states = {
        parameter: {name: whole(value).cpu() if torch.is_tensor(value) else value for name, value in state.items()}
        for parameter, state in saved["state"].items()
    }
    return {**saved, "state": states}


def load_whole_optimizer_(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Take over what `whole_optimizer_state` gave, or the state of a single process; each rank keeps its rows."""
    optimizer.load_state_dict(saved)
    for parameter, state in optimizer.state.items():
        if isinstance(parameter, DTensor):
            for name, value in state.items():
                # Moments, and numbers of rows such as ages: not those that an optimiser keeps of columns.
                if torch.is_tensor(value) and value.dim() == parameter.dim() and len(value) == len(parameter):
                    state[name] = distribute_tensor(
                        value, parameter.device_mesh, parameter.placements, src_data_rank=None
                    )

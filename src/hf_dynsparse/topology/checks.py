"""
What a run refuses before its first topology update: layers that could not be updated, or not change their sizes, and
ranks that would do different things.
"""

from collections.abc import Set

import torch
from torch.distributed.tensor import DTensor

from ..nn.shards import local_rows
from ..optim.second_moment import check_second_moment
from .counts import Layers


def check_updatable(layers: Layers, optimizer: torch.optim.Optimizer, needs: Set[str] = frozenset()) -> None:
    """
    Refuse layers that do not train, whose blocks an update could not find, or whose moments it could not clear, or not
    look at if that is among its `needs`.

    Raises:
        ValueError: naming the first such layer.
    """
    frozen = [name for name, layer in layers.items() if not layer.values.requires_grad]
    if frozen:
        raise ValueError(
            "A topology update regrows blocks at zero, so values must train. Got frozen values in "
            f"{len(frozen)} of {len(layers)} sparse layers, first `{frozen[0]}`. Train them, or ask for no updates: "
            "`num_topology_updates=0` in DynSparseTrainingArguments, `num_updates=0` here. With LoRA only the "
            "adapters train."
        )
    _check_separate(layers)
    trained = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    for name, layer in layers.items():
        if layer.values.shape != (len(layer.block_index), *layer.block_shape):
            raise ValueError(
                f"A topology update needs whole blocks. Got `{name}.values` of shape {tuple(layer.values.shape)} for "
                f"{len(layer.block_index)} blocks of {layer.block_shape}: FSDP1 and DeepSpeed ZeRO-3 flatten "
                "parameters. Launch with DDP, or with FSDP2 (`fsdp_version: 2`)."
            )
        local_rows(layer.values)
        if layer.values not in trained:
            raise ValueError(
                f"The optimizer must train the parameters that the model has now. Got one without `{name}.values`. "
                "Make it from `model.parameters()` after `fully_shard`. DeepSpeed keeps copies of its own: use DDP "
                "or FSDP2."
            )
        if "second_moment" in needs:
            check_second_moment(optimizer, layer.values, f"{name}.values")


def _check_separate(layers: Layers) -> None:
    """An update of one layer would change half of another."""
    owners: dict[tuple[str, int], str] = {}
    for name, layer in layers.items():
        index = local_rows(layer.block_index)[0].data_ptr()
        for part, identity in (("values", id(layer.values)), ("block_index", index)):
            owner = owners.setdefault((part, identity), name)
            if owner != name:
                raise ValueError(
                    f"A sparse layer must have `values` and `block_index` of its own for topology updates. Got one "
                    f"`{part}` for `{owner}` and `{name}`. To tie two layers, put one and the same "
                    "`BlockSparseLinear` into both places; or ask for no updates."
                )


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


def check_ranks_agree(topology: int, run: int, device: torch.device, received: str) -> None:
    """
    Compare checksums of the topology and of what the run does with it over all ranks; nothing to do in one process.

    Args:
        received (`str`): what the run does here, in words.

    Raises:
        RuntimeError: on every rank, naming the ranks that differ from rank 0.
    """
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not distributed or torch.distributed.get_world_size() == 1:
        return
    own = torch.tensor([run, topology], dtype=torch.int64, device=device)
    every = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(every, own)
    others = [[rank for rank, other in enumerate(every) if other[what] != every[0][what]] for what in (0, 1)]
    if others[0]:
        raise RuntimeError(
            f"All ranks must update the topology alike. Got something else on rank(s) {others[0]} than on rank 0; "
            f"here {received}. Give every rank the same arguments and the same model."
        )
    if others[1]:
        raise RuntimeError(
            f"All ranks must have the same topology. Got another one on rank(s) {others[1]} than on rank 0: their "
            "values would be averaged block by block although they stand in different places. Give every rank the "
            "same seed and the same initial model."
        )

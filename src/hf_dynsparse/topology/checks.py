"""What a run refuses before its first topology update: layers that could not be updated, or not change their sizes."""

import torch
from torch.distributed.tensor import DTensor

from ..shards import local_rows
from .allocation import Layers


def check_updatable(layers: Layers, optimizer: torch.optim.Optimizer) -> None:
    """
    Refuse layers that do not train, whose blocks an update could not find, or whose moments it could not clear.

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

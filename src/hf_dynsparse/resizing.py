"""
What depends on the sizes of sparse layers when their density changes: the configuration, checkpoints of half-way
models, the reducer of DDP.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import DistributedDataParallelKwargs
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from .checkpoint import weight_files
from .integrity import open_weights
from .models.bert.configuration_dynsparse_bert import DynSparseBertConfig, encoder_shapes
from .models.bert.modeling_dynsparse_bert import DynSparseBertPreTrainedModel
from .nn import sparse_layers
from .topology.resize import set_size_


def sizes_of(model: nn.Module) -> dict[str, int]:
    """Active blocks of each sparse layer."""
    return {name: layer.nnzb for name, layer in sparse_layers(model).items()}


def configured(model: nn.Module, final_sparsity: float | None = None) -> dict[str, Any]:
    """
    What the configuration of a model says of its density, to come back to when the density does; or what it is to say
    when the model has reached `final_sparsity`.
    """
    if not isinstance(model, DynSparseBertPreTrainedModel):
        return {}
    if final_sparsity is not None:
        return {"sparsity": final_sparsity, "nnzb": None}
    return {"sparsity": model.config.sparsity, "nnzb": model.config.nnzb}


def distribution_of(model: nn.Module) -> str:
    """How the configuration of a model spreads its density over the layers; uniformly, if it does not say."""
    config = getattr(model, "config", None)
    settings = config if isinstance(config, DynSparseBertConfig) else getattr(config, "quantization_config", None)
    return str(getattr(settings, "distribution", "uniform"))


def tell_config_(model: nn.Module, wanted: Mapping[str, Any]) -> None:
    """
    Make the configuration of `model` say how many blocks its layers have: as in `wanted`, what `configured` gave, if
    that fits, else layer by layer. Models that `sparsify_` has made write theirs when they are saved.
    """
    if not isinstance(model, DynSparseBertPreTrainedModel):
        return
    config = model.config
    sizes = sizes_of(model.base_model.get_submodule("encoder"))
    config.sparsity, config.nnzb = wanted["sparsity"], wanted["nnzb"]
    if sizes != config.nnzb_per_layer():
        positions = sum(height * width for height, width in encoder_shapes(config).values())
        config.nnzb = sizes
        config.sparsity = 1.0 - config.num_active_entries() / positions


def resize_to_checkpoint_(model: nn.Module, checkpoint: str | Path, *, optimizer: Optimizer | None) -> None:
    """
    Give the sparse layers of `model`, and their moments in `optimizer`, the sizes that they have in a checkpoint,
    which is loaded next.
    """
    layers = sparse_layers(model)
    for name, nnzb in _saved_sizes(model, checkpoint).items():
        set_size_(layers[name], nnzb, optimizer=optimizer)


def check_final_sizes(model: nn.Module, given: Mapping[str, int], checkpoint: str | Path, callback: str) -> None:
    """
    Args:
        given (`Mapping[str, int]`): the sizes of `model` before an interrupted run changed them.

    Raises:
        ValueError: if `model` had neither the sizes that the run of `checkpoint` was started with, which are those of
            its end or, with `final_sparsity`, of its beginning; nor has those of the checkpoint.
    """
    state = TrainerState.load_from_json(str(Path(checkpoint, TRAINER_STATE_NAME)))
    saved: Any = state.stateful_callbacks.get(callback, {})
    final = saved.get("attributes", {}).get("final")
    if final is None or given == final["sizes"] or sizes_of(model) == _saved_sizes(model, checkpoint):
        return
    name = next(name for name in given if given[name] != final["sizes"].get(name))
    raise ValueError(
        f"A resumed run must have the model of its checkpoint. Got `{name}` with {given[name]} active blocks, but the "
        f"run of {checkpoint} was given one with {final['sizes'].get(name, 'none')}. Start from the same model, with "
        "the same sparsity, block size and distribution, or write to a new folder."
    )


def _saved_sizes(model: nn.Module, checkpoint: str | Path) -> dict[str, int]:
    sizes = {}
    for file in weight_files(checkpoint):
        with open_weights(file) as weights:
            for name in {f"{name}.values" for name in sparse_layers(model)} & set(weights.keys()):
                sizes[name.removesuffix(".values")] = weights.get_slice(name).get_shape()[0]
    return sizes


def rebuild_reducer_(model: DistributedDataParallel, handler: DistributedDataParallelKwargs | None) -> None:
    """Wrap the same model again, in place, as accelerate has done: a reducer knows the sizes of parameters."""
    settings = {} if handler is None else handler.to_kwargs()
    # The old one goes first: as long as it lives, so do the nodes of the graph that add up gradients of the old sizes.
    del model.reducer, model.logger
    DistributedDataParallel.__init__(model, model.module, model.device_ids, model.output_device, **settings)
    if handler is not None:
        handler.register_comm_hook(model)

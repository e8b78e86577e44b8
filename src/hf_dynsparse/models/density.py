"""How many blocks the sparse layers of a model have, and what its configuration says of that."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..nn.linear import sparse_layers
from .bert.configuration_dynsparse_bert import DynSparseBertConfig
from .bert.modeling_dynsparse_bert import DynSparseBertPreTrainedModel


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
    return str(getattr(_settings(model), "distribution", "uniform"))


def sparsity_of(model: nn.Module) -> float:
    """The sparsity that the configuration of a model asks for; 0 if it does not say."""
    return float(getattr(_settings(model), "sparsity", 0.0))


def block_size_of(model: nn.Module) -> Any:
    """The block size that the configuration of a model gives; `None` if it does not say."""
    return getattr(_settings(model), "block_size", None)


def _settings(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    return config if isinstance(config, DynSparseBertConfig) else getattr(config, "quantization_config", None)


def tell_config_(model: nn.Module, wanted: Mapping[str, Any]) -> None:
    """
    Make the configuration of `model` say how many blocks its layers have: as in `wanted`, what `configured` gave, if
    that fits, else layer by layer. Models that `sparsify_` has made write theirs when they are saved.
    """
    if not isinstance(model, DynSparseBertPreTrainedModel):
        return
    config, sizes = model.config, sizes_of(model.base_model.get_submodule("encoder"))
    config.sparsity, config.nnzb = wanted["sparsity"], wanted["nnzb"]
    if sizes != config.nnzb_per_layer():
        config.set_nnzb(sizes)

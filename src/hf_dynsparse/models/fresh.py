"""A fresh model of any architecture, sparse from the first moment: no encoder matrix is ever allocated dense."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ..blocks.draw import random_block_index
from ..nn.linear import BlockSparseLinear, trainable_layers
from .bert.configuration_dynsparse_bert import DynSparseBertConfig
from .sparsify import sparsify_


class _Values(nn.Parameter):
    """Values of a sparse layer in the place of its dense weight; the shape is that weight's, for rules that ask."""

    dense_shape: torch.Size

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        return self.dense_shape


def sparse_from_config(
    auto_class: Any,
    config: PretrainedConfig,
    block_size: int | tuple[int, int] = 16,
    sparsity: float = 0.9,
    *,
    distribution: str = "uniform",
    targets: Iterable[str] = ("*",),
    ignore: Iterable[str] | None = None,
) -> PreTrainedModel:
    """
    A fresh model of any architecture with random blocks, to be trained sparse from the start. Nothing is allocated but
    what it keeps. It saves and loads as [`sparsify_`] says.

    Values, biases and all else are drawn by the architecture's own rule (its `_init_weights`), values as those of the
    dense layer in that place: not rescaled by density (arXiv:2108.06277, section 3). Blocks are uniformly random. All
    come from the global generator: call `set_seed` before. Under `torch.device("meta")` only shapes are made.

    Args:
        auto_class: a class such as [`~transformers.AutoModelForMaskedLM`].
        config (`PretrainedConfig`): of the dense model.
        block_size, sparsity, distribution, targets, ignore: see [`sparsify_`].

    Raises:
        ValueError: as [`sparsify_`] does; for a `DynSparseBertConfig`, which says itself how sparse it is; or if the
            architecture has no rule for a weight.

    Example:
        ```python
        >>> config = RobertaConfig(hidden_size=256, num_hidden_layers=4, num_attention_heads=4)
        >>> model = sparse_from_config(AutoModelForMaskedLM, config, block_size=16, sparsity=0.9)
        ```
    """
    if isinstance(config, DynSparseBertConfig):
        raise ValueError(
            "`config` must be that of a dense model. Got a DynSparseBertConfig, which says itself how sparse its "
            "model is: call `from_config` of the Auto class."
        )
    device = torch.get_default_device()
    with torch.device("meta"):
        model: Any = auto_class.from_config(config)
        dense: dict[str, Any] = {name: module for name, module in model.named_modules() if name}
        sparsify_(model, block_size, sparsity, distribution=distribution, targets=targets, ignore=ignore)
    if device.type == "meta":
        return model
    model.to_empty(device=device)
    _draw_(model, {name: (dense[name], layer) for name, layer in trainable_layers(model).items()})
    return model


@torch.no_grad()
def _draw_(model: Any, layers: dict[str, tuple[Any, BlockSparseLinear]]) -> None:
    """Draw all that a model holds; `layers` by name: the dense ones on meta, and the sparse ones in their place."""
    for tensor in _floats(model).values():
        tensor.fill_(torch.nan)
    # The rules know dense layers: these stand in, and hold the memory of the sparse ones.
    for name, (linear, layer) in layers.items():
        layer.block_index.copy_(random_block_index(layer.num_blocks, layer.nnzb, None))
        shape, linear.weight = linear.weight.shape, _Values(layer.values)
        linear.weight.dense_shape, linear.bias = shape, layer.bias
        model.set_submodule(name, linear)
    model.initialize_weights()
    for name, (_, layer) in layers.items():
        model.set_submodule(name, layer)
    model.tie_weights()
    missed = [name for name, tensor in _floats(model).items() if tensor.isnan().any()]
    if missed:
        raise ValueError(
            f"An architecture must say how its weights begin. Got {type(model).__name__}, whose `_init_weights` "
            f"leaves out {', '.join(missed[:3])}. Build it dense by `from_config`, and call `sparsify_`."
        )


def _floats(model: nn.Module) -> dict[str, torch.Tensor]:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}

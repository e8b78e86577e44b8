"""Slimming: a dense BERT without some of its attention heads and intermediate neurons, in smaller dense matrices."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, cast

import torch
from transformers import BertConfig, PreTrainedModel

from ... import models
from ...models import DynSparseBertConfig
from ...models.bert.configuration_dynsparse_bert import layer_sizes
from ...models.bert.modeling_dynsparse_bert import DynSparseBertPreTrainedModel
from ...nn.linear import sparse_layers
from ..int8.layers import Int8Layer
from ..int8.qat import QuantizationAware


class Unit(NamedTuple):
    """Where a layer keeps its heads, or its neurons: as rows of some matrices, with their biases, and as columns."""

    name: str
    rows: tuple[str, ...]
    columns: str


HEADS = Unit("heads", ("attention.self.query", "attention.self.key", "attention.self.value"), "attention.output.dense")
NEURONS = Unit("neurons", ("intermediate.dense",), "output.dense")


@torch.no_grad()
def slim(
    model: PreTrainedModel,
    heads: Sequence[Iterable[int]],
    neurons: Sequence[Iterable[int]],
    *,
    head_gates: Sequence[torch.Tensor] | None = None,
    neuron_gates: Sequence[torch.Tensor] | None = None,
) -> DynSparseBertPreTrainedModel:
    """
    A copy of a dense BERT with some of its attention heads and intermediate neurons only, in smaller dense matrices
    (EarlyBERT, arXiv:2101.00063). What stays is bit-identical and in its old order; nothing is shared.

    Args:
        model (`PreTrainedModel`): a stock BERT, or a DynSparse BERT without sparse layers, slimmed before or not.
        heads, neurons (`Sequence[Iterable[int]]`): for each layer the heads, or intermediate neurons, that stay.
        head_gates, neuron_gates (`Sequence[torch.Tensor]`, *optional*): for each layer a factor for the output of
            every head, or neuron, that it has in `model`, of shape `(heads,)` or `(neurons,)`. Those of what stays are
            folded into the columns of `attention.output.dense` or `output.dense`.

    Returns:
        `DynSparseBertPreTrainedModel`: the class with the same head and `sparsity=0`. It computes what `model` would
        if the outputs of all other heads and neurons were zero. Its block size is 1, which divides layers of any size.

    Raises:
        ValueError: if the model is sparse, int8 or quantisation-aware, or has no counterpart here, an index is out of
            range or repeated, a layer keeps nothing, or there are not as many entries as layers, or gates as heads or
            neurons.

    Example:
        ```python
        >>> bert = BertForMaskedLM.from_pretrained("bert-base-uncased")
        >>> small = slim(bert, heads=[range(8)] * 12, neurons=[range(1024)] * 12)
        >>> sparse = sparsify_(small, block_size=16, sparsity=0.9)
        ```
    """
    cls, sizes, dense = _counterpart(model), layer_sizes(model.config), cast(BertConfig, model.config)
    kept_heads = _checked(HEADS, heads, head_gates, [of_layer for of_layer, _ in sizes])
    kept_neurons = _checked(NEURONS, neurons, neuron_gates, [of_layer for _, of_layer in sizes])
    config = DynSparseBertConfig.from_stock(
        dense,
        sparsity=0.0,
        nnzb=None,
        block_size=1,
        heads_per_layer=[len(kept) for kept in kept_heads],
        intermediate_sizes=[len(kept) for kept in kept_neurons],
    )
    # Copies: a loaded model takes over the very tensors that it is given.
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    for number in range(config.num_hidden_layers):
        layer = f"{prefix}encoder.layer.{number}."
        gates = None if head_gates is None else head_gates[number]
        _keep_(state, layer, HEADS, kept_heads[number], gates, config.hidden_size // config.num_attention_heads)
        gates = None if neuron_gates is None else neuron_gates[number]
        _keep_(state, layer, NEURONS, kept_neurons[number], gates, 1)
    slimmed: Any = cls.from_pretrained(None, config=config, state_dict=state, dtype=model.dtype)
    return slimmed.to(model.device).train(model.training)


def _counterpart(model: PreTrainedModel) -> Any:
    """The DynSparse class with the head of `model`, which must be dense and plain."""
    for part, layer in model.named_modules():
        if isinstance(layer, QuantizationAware | Int8Layer):
            raise ValueError(
                f"`slim` must get a model in floating point. Got {type(model).__name__} with `{part}`, a "
                f"{type(layer).__name__}. Slim first and call `prepare_qat_` then; an int8 model has `dequantize`."
            )
    if sparse := sparse_layers(model):
        raise ValueError(
            f"`slim` must get a dense model. Got {type(model).__name__} with {len(sparse)} sparse layers, such as "
            f"`{next(iter(sparse))}`. Slim first, then sparsify; or `densify_` it before."
        )
    name = f"DynSparse{type(model).__name__.removeprefix('DynSparse')}"
    if name not in models.__all__:
        raise ValueError(
            f"`slim` must get a BERT with a head that has its class here. Got {type(model).__name__}. Choose from "
            f"{', '.join(known.removeprefix('DynSparse') for known in models.__all__ if 'Config' not in known)}."
        )
    return getattr(models, name)


def _checked(
    unit: Unit, kept: Sequence[Iterable[int]], gates: Sequence[torch.Tensor] | None, sizes: list[int]
) -> list[list[int]]:
    """The indices that stay in each layer of `sizes`, in order."""
    for name, given in ((unit.name, kept), (f"{unit.name[:-1]}_gates", gates)):
        if given is not None and len(given) != len(sizes):
            raise ValueError(f"`{name}` must have an entry for each of {len(sizes)} layers. Got {len(given)}.")
    indices = [sorted(map(int, of_layer)) for of_layer in kept]
    for number, (staying, size) in enumerate(zip(indices, sizes, strict=True)):
        if not staying:
            raise ValueError(
                f"`{unit.name}` must leave every layer at least one. Got none for layer {number}. Keep its best."
            )
        if staying[0] < 0 or staying[-1] >= size or len(set(staying)) < len(staying):
            raise ValueError(
                f"`{unit.name}` of layer {number} must be different indices in [0, {size - 1}]. Got {staying[:8]}"
                f"{' and more' if len(staying) > 8 else ''}."
            )
        if gates is not None and gates[number].shape != (size,):
            raise ValueError(
                f"`{unit.name[:-1]}_gates` of layer {number} must have shape ({size},), one for each that it has. Got "
                f"{tuple(gates[number].shape)}."
            )
    return indices


def _keep_(
    state: dict[str, torch.Tensor],
    layer: str,
    unit: Unit,
    kept: list[int],
    gates: torch.Tensor | None,
    size: int,
) -> None:
    """Of one layer in `state` keep some units, each of `size` rows and columns."""
    device = state[f"{layer}{unit.columns}.weight"].device
    index = (torch.tensor(kept, device=device)[:, None] * size + torch.arange(size, device=device)).flatten()
    for name in unit.rows:
        for leaf in ("weight", "bias"):
            state[f"{layer}{name}.{leaf}"] = state[f"{layer}{name}.{leaf}"][index]
    columns = state[f"{layer}{unit.columns}.weight"][:, index]
    if gates is not None:
        columns *= gates.to(columns).repeat_interleave(size)[index]
    state[f"{layer}{unit.columns}.weight"] = columns

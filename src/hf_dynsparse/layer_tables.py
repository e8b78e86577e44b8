"""What the layers of a model are, and what they cost beside dense ones: the rows of a model card's tables."""

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .body import body_modules
from .flops import inference_flops_per_sequence
from .int8.embedding import Int8Embedding
from .int8.layers import Int8BlockSparseLinear
from .int8.quantizer import int8_modules
from .models import DynSparseBertConfig
from .models.bert.configuration_dynsparse_bert import layer_sizes
from .nn import BlockSparseLinear, sparse_layers


def count_layers(model: PreTrainedModel) -> dict[str, Any]:
    """The sparse layers of a model, one by one and by kind, and how much there is of what."""
    layers = sparse_layers(model)
    kinds = defaultdict(list)
    for name, layer in layers.items():
        kinds[re.sub(r"\.\d+(?=\.|$)", ".*", name), layer.shape, layer.block_shape].append(layer)
    linears = [x for x in body_modules(model).values() if isinstance(x, nn.Linear | Conv1D | BlockSparseLinear)]
    return {
        "each": [_row(name, [layer]) for name, layer in layers.items()],
        "kinds": [[*_row(name, alike), len(alike)] for (name, *_), alike in kinds.items()],
        "linears": len(linears),
        "blocks": sorted({_times(layer.block_shape) for layer in layers.values()}),
        "nnz": sum(layer.values.numel() for layer in layers.values()),
        "positions": sum(layer.in_features * layer.out_features for layer in layers.values()),
        "dense": count_weights(model)[0] - sum(layer.values.numel() for layer in layers.values()),
        "int8": len(int8_modules(model)),
        "int8_embeddings": any(isinstance(module, Int8Embedding) for module in int8_modules(model).values()),
    }


def count_weights(model: PreTrainedModel) -> tuple[int, int]:
    """Weights of a model, int8 and int32 ones among them, and their bytes: no indices and no scales."""
    tensors = list(model.parameters())
    for module in int8_modules(model).values():
        tensors += [getattr(module, leaf) for leaf in ("int8_values", "int32_bias") if leaf in module._buffers]
    held = [tensor for tensor in tensors if tensor is not None]
    return sum(tensor.numel() for tensor in held), sum(tensor.numel() * tensor.element_size() for tensor in held)


def count_costs(model: PreTrainedModel, facts: Mapping[str, Any]) -> list[list[str]]:
    """
    Rows of what a model takes, what it would take with dense layers, and the share. Of a dense model its own only.

    Args:
        facts (`Mapping[str, Any]`): of its run, if known: `seq_len`, tokens of a sequence; `flops` and `tokens` of the
            training; or `dense_flops` instead of the latter.
    """
    layers, int8 = sparse_layers(model).values(), int8_modules(model)
    parameters, whole = count_weights(model)
    values = sum(layer.values.numel() * layer.values.element_size() for layer in layers)
    indices = sum(_index_bytes(layer) for layer in layers)
    size = 4 if int8 else 0  # the dense model beside an int8 one is in float32
    as_dense = sum(layer.in_features * layer.out_features * (size or layer.values.element_size()) for layer in layers)
    inactive = sum(layer.in_features * layer.out_features - layer.values.numel() for layer in layers)
    dense = [module.int8_values for module in int8.values() if not isinstance(module, Int8BlockSparseLinear)]
    gained = 3 * sum(matrix.numel() for matrix in dense)
    rows: list[tuple[str, str, float, float]] = [
        ("parameters", "{:,}", parameters, parameters + inactive),
        ("MB of the checkpoint", "{:,.2f}", (whole + indices) / 1e6, (whole - values + as_dense + gained) / 1e6),
    ]
    if layers:
        rows.append(("MB of its sparse matrices", "{:,.2f}", (values + indices) / 1e6, as_dense / 1e6))
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions:  # a text model of one stack, as the count of FLOPs wants it
        length = facts.get("seq_len") or min(128, positions)
        forward = inference_flops_per_sequence(model, length)
        rows.append((f"FLOPs of a forward pass, {length} tokens", "{:.4g}", forward, forward + 2 * length * inactive))
    flops = facts.get("flops") or 0
    # Where it is not known, the density was the same all the time.
    dense_flops = facts.get("dense_flops") or flops + 6 * facts.get("tokens", 0) * inactive
    if flops and dense_flops:
        rows.append(("FLOPs of the training", "{:.4g}", flops, dense_flops))
    cells = [[what, form.format(ours), form.format(dense), f"{ours / dense:.1%}"] for what, form, ours, dense in rows]
    return cells if layers or int8 else [row[:2] for row in cells]


def _index_bytes(layer: BlockSparseLinear) -> int:
    if isinstance(layer, Int8BlockSparseLinear):
        return layer.block_code.numel()
    return layer.nnzb * layer.block_index.element_size()


def count_units(config: PretrainedConfig) -> dict[str, list[int]]:
    """Attention heads and intermediate neurons by layer, of a BERT whose layers have numbers of their own."""
    if not isinstance(config, DynSparseBertConfig) or not (config.heads_per_layer or config.intermediate_sizes):
        return {}
    heads, neurons = zip(*layer_sizes(config), strict=True)
    return {"attention heads": list(heads), "intermediate neurons": list(neurons)}


def _row(name: str, layers: list[BlockSparseLinear]) -> list[Any]:
    """Name, shape, block, active blocks and density of layers of one shape: ranges, where they differ."""

    def span(values: list[Any], form: str) -> str:
        return " to ".join(dict.fromkeys(form.format(value) for value in (min(values), max(values))))

    counts, densities = [x.nnzb for x in layers], [x.nnzb / x.num_blocks for x in layers]
    shape, block = _times(layers[0].shape), _times(layers[0].block_shape)
    return [f"`{name}`", shape, block, span(counts, "{:,}"), span(densities, "{:.4f}")]


def _times(sides: tuple[int, int]) -> str:
    return " x ".join(map(str, sides))

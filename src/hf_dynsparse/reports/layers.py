"""What the layers of a model are, and what they cost beside dense ones: the rows of a model card's tables."""

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..compress.int8.embedding import Int8Embedding
from ..compress.int8.layers import Int8BlockSparseLinear
from ..compress.int8.quantizer import int8_modules
from ..models.flops import inference_flops_per_sequence
from ..models.heads import body_modules
from ..nn.linear import LinearLayer, SparseLayer, sparse_layers
from ..ops import describe_choice


@dataclass(frozen=True)
class LayerTopology:
    """One row of a `TopologySummary`."""

    name: str
    shape: tuple[int, int]
    block_shape: tuple[int, int]
    nnzb: int
    density: float
    backend: str
    why: str


@dataclass(frozen=True)
class TopologySummary:
    """What is sparse in a model; `print` shows it as a table."""

    layers: tuple[LayerTopology, ...]

    @property
    def nnz(self) -> int:
        """Active entries of all sparse layers."""
        return sum(layer.nnzb * layer.block_shape[0] * layer.block_shape[1] for layer in self.layers)

    @property
    def positions(self) -> int:
        """Entries the same layers would have if dense."""
        return sum(layer.shape[0] * layer.shape[1] for layer in self.layers)

    @property
    def sparsity(self) -> float:
        """Share of inactive positions over all sparse layers; 0 for a dense model."""
        return 1.0 - self.nnz / self.positions if self.layers else 0.0

    def __str__(self) -> str:
        width = max([len(layer.name) for layer in self.layers], default=5)
        lines = [f"{'layer':{width}}  {'shape':>11}  {'block':>7}  {'nnzb':>9}  density  backend"]
        for layer in self.layers:
            shape, block = "x".join(map(str, layer.shape)), "x".join(map(str, layer.block_shape))
            lines.append(
                f"{layer.name:{width}}  {shape:>11}  {block:>7}  {layer.nnzb:>9,}  {layer.density:7.4f}  "
                f"{layer.backend}"
            )
        lines.append(f"{len(self.layers)} sparse layers, {self.nnz:,} of {self.positions:,} entries active")
        reasons = {(layer.shape, layer.block_shape, layer.nnzb, layer.backend): layer.why for layer in self.layers}
        for ((out_features, in_features), _, nnzb, backend), why in reasons.items():
            lines.append(f"{out_features}x{in_features} nnzb={nnzb:,} by {backend}: {why}")
        return "\n".join(lines)


def count_layers(model: PreTrainedModel) -> dict[str, Any]:
    """The sparse layers of a model, one by one and by kind, and how much there is of what."""
    layers = sparse_layers(model)
    kinds = defaultdict(list)
    for name, layer in layers.items():
        kinds[re.sub(r"\.\d+(?=\.|$)", ".*", name), layer.shape, layer.block_shape].append(layer)
    linears = [x for x in body_modules(model).values() if isinstance(x, nn.Linear | Conv1D | LinearLayer)]
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


def _index_bytes(layer: SparseLayer) -> int:
    if isinstance(layer, Int8BlockSparseLinear):
        return layer.block_code.numel()
    return layer.nnzb * layer.block_index.element_size()


def _row(name: str, layers: list[SparseLayer]) -> list[Any]:
    """Name, shape, block, active blocks and density of layers of one shape: ranges, where they differ."""

    def span(values: list[Any], form: str) -> str:
        return " to ".join(dict.fromkeys(form.format(value) for value in (min(values), max(values))))

    counts, densities = [x.nnzb for x in layers], [x.nnzb / x.num_blocks for x in layers]
    shape, block = _times(layers[0].shape), _times(layers[0].block_shape)
    return [f"`{name}`", shape, block, span(counts, "{:,}"), span(densities, "{:.4f}")]


def _times(sides: tuple[int, int]) -> str:
    return " x ".join(map(str, sides))


def topology_summary(model: nn.Module) -> TopologySummary:
    """Shape, block, active blocks, density and backend of every sparse layer, and why that backend."""
    return TopologySummary(
        tuple(
            LayerTopology(
                name,
                layer.shape,
                layer.block_shape,
                layer.nnzb,
                layer.nnzb / layer.num_blocks,
                *describe_choice(layer.problem()),
            )
            for name, layer in sparse_layers(model).items()
        )
    )

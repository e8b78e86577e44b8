"""What is sparse in a model, and how big the model is: the facts behind cards, summaries, estimates and inspection."""

from dataclasses import dataclass
from math import prod

from torch import Tensor, nn

from ..nn.linear import SparseLayer, sparse_layers
from .tables import plain_table


# What a sparse layer stores of its weight: values and block index, in floating point or in int8.
WEIGHT_LEAVES = ("values", "block_index", "int8_values", "block_code")
# Buffers that count as weights (the parameters of an int8 layer), and those that hold block indices.
_INT8_LEAVES = ("int8_values", "int32_bias")
_INDEX_LEAVES = ("block_index", "block_code")


@dataclass(frozen=True)
class LayerFacts:
    """
    A sparse layer of a model or of a checkpoint.

    Args:
        name (`str`): its name in the model.
        shape (`tuple[int, int]`): `(out_features, in_features)`.
        block_shape (`tuple[int, int]`): rows and columns of a block.
        nnzb (`int`): active blocks.
        bytes (`int`): what its weight takes: values and block index; in a checkpoint of a run also its exploration.
        dense_bytes (`int`): what the dense weight would take in the same dtype; of an int8 layer in float32.
    """

    name: str
    shape: tuple[int, int]
    block_shape: tuple[int, int]
    nnzb: int
    bytes: int
    dense_bytes: int

    @property
    def nnz(self) -> int:
        """Active entries."""
        return self.nnzb * prod(self.block_shape)

    @property
    def density(self) -> float:
        """Share of active entries."""
        return self.nnz / prod(self.shape)

    def cells(self, times: str = "x") -> list[str]:
        """Name, shape, block, active blocks and density, as a table shows them."""
        shape, block = (times.join(map(str, sides)) for sides in (self.shape, self.block_shape))
        return [self.name, shape, block, f"{self.nnzb:,}", f"{self.density:.4f}"]


class SparseTotals:
    """Sums over `layers`, for what has such."""

    layers: tuple[LayerFacts, ...]

    @property
    def nnz(self) -> int:
        """Active entries of all sparse layers."""
        return sum(layer.nnz for layer in self.layers)

    @property
    def positions(self) -> int:
        """Entries the same layers would have if dense."""
        return sum(prod(layer.shape) for layer in self.layers)

    @property
    def sparsity(self) -> float:
        """Share of inactive positions over all sparse layers; 0 for a dense model."""
        return 1.0 - self.nnz / self.positions if self.layers else 0.0


@dataclass(frozen=True)
class ModelFacts(SparseTotals):
    """
    What [`model_facts`] finds.

    Args:
        layers (`tuple[LayerFacts, ...]`): the sparse layers.
        parameters (`int`): all weights, those of int8 layers among them; tied ones count once.
        bytes (`int`): of weights and block indices.
        dense_bytes (`int`): of the weights of the same model with dense layers; instead of int8 ones in float32.
    """

    layers: tuple[LayerFacts, ...]
    parameters: int
    bytes: int
    dense_bytes: int

    @property
    def dense_parameters(self) -> int:
        """Weights of the same model with dense layers."""
        return self.parameters + self.positions - self.nnz


@dataclass(frozen=True)
class LayerTopology(LayerFacts):
    """A row of a `TopologySummary`: also what computes the products of the layer, and why."""

    backend: str
    why: str


@dataclass(frozen=True)
class TopologySummary(SparseTotals):
    """What is sparse in a model; `print` shows it as a table."""

    layers: tuple[LayerTopology, ...]

    def __str__(self) -> str:
        rows = [["layer", "shape", "block", "nnzb", "density", "backend"]]
        rows += [[*layer.cells(), layer.backend] for layer in self.layers]
        lines = [plain_table(rows, least=(5, 11, 7, 9), left=(0, 5))]
        lines.append(f"{len(self.layers)} sparse layers, {self.nnz:,} of {self.positions:,} entries active")
        reasons = {(layer.shape, layer.block_shape, layer.nnzb, layer.backend): layer.why for layer in self.layers}
        for ((out_features, in_features), _, nnzb, backend), why in reasons.items():
            lines.append(f"{out_features}x{in_features} nnzb={nnzb:,} by {backend}: {why}")
        return "\n".join(lines)


def model_facts(model: nn.Module, part: str = "") -> ModelFacts:
    """
    What is sparse in a model and how big it is. Only shapes and dtypes are read: it may be on the meta device.

    Args:
        model (`nn.Module`): with or without sparse layers.
        part (`str`, *optional*): count only tensors with this in their name, such as `".encoder."`.
    """
    layers = tuple(
        LayerFacts(name, *_sizes(layer)) for name, layer in sparse_layers(model).items() if part in f"{name}."
    )
    buffers = {name: tensor for name, tensor in model.named_buffers() if part in name}
    weights = [
        *(tensor for name, tensor in model.named_parameters() if part in name),
        *_ending(buffers, *_INT8_LEAVES),
    ]
    stored = sum(map(_bytes, weights)) + sum(map(_bytes, _ending(buffers, *_INDEX_LEAVES)))
    # Dense int8 matrices, embeddings among them: an entry would take three bytes more in float32.
    int8 = sum(tensor.numel() for tensor in _ending(buffers, "int8_values") if tensor.dim() == 2)
    rest = stored - sum(layer.bytes for layer in layers)
    return ModelFacts(
        layers,
        sum(tensor.numel() for tensor in weights),
        stored,
        rest + sum(layer.dense_bytes for layer in layers) + 3 * int8,
    )


def topology_summary(model: nn.Module) -> TopologySummary:
    """Shape, block, active blocks, density and backend of every sparse layer, and why that backend."""
    return TopologySummary(
        tuple(
            LayerTopology(name, *_sizes(layer), *layer.describe_backend())
            for name, layer in sparse_layers(model).items()
        )
    )


def _sizes(layer: SparseLayer) -> tuple[tuple[int, int], tuple[int, int], int, int, int]:
    """The fields of a `LayerFacts` but its name."""
    stored = {**dict(layer.named_parameters(recurse=False)), **dict(layer.named_buffers(recurse=False))}
    entry = 4 if "int8_values" in stored else layer.values.element_size()  # bytes of a dense one
    held = sum(_bytes(tensor) for name, tensor in stored.items() if name in WEIGHT_LEAVES)
    return layer.shape, layer.block_shape, layer.nnzb, held, prod(layer.shape) * entry


def _ending(tensors: dict[str, Tensor], *leaves: str) -> list[Tensor]:
    return [tensor for name, tensor in tensors.items() if name.rpartition(".")[2] in leaves]


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()

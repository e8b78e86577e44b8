"""The sparse linear layer, its exchange for dense ones, and its shards."""

from .linear import BlockSparseLinear, sparse_layers
from .replace import densify_, sparsify_


__all__ = ["BlockSparseLinear", "densify_", "sparse_layers", "sparsify_"]

"""The sparse linear layer, its exchange for dense ones, and its shards."""

from .linear import BlockSparseLinear, sparse_layers


__all__ = ["BlockSparseLinear", "sparse_layers"]

"""The sparse layers of stock transformers models."""

import math
from typing import Any

import torch
from torch import nn
from transformers import Conv1D

from ...nn.linear import BlockSparseLinear


class SparseLinear(BlockSparseLinear):
    """A [`BlockSparseLinear`] in a stock transformers model."""

    @property
    def weight(self) -> torch.Tensor:
        """
        A placeholder of the dense shape, for architectures whose code asks a linear layer for the dtype, device or
        shape of its weight. It takes no memory, and is NaN throughout: to compute with it would be an error.
        """
        placeholder: Any = self.values.new_full((), math.nan).expand(self.shape)
        placeholder._is_hf_initialized = True  # the initialisation of some architectures must leave it alone
        return placeholder


class SparseConv1D(SparseLinear):
    """Replaces a [`~transformers.pytorch_utils.Conv1D`], the linear layer of GPT-2, which is stored transposed."""

    @staticmethod
    def dense_shape(linear: Any) -> tuple[int, int]:
        """See [`BlockSparseLinear.dense_shape`]."""
        return linear.nf, linear.nx

    @classmethod
    def from_dense(
        cls,
        linear: Any,
        block_size: int | tuple[int, int] = 16,
        sparsity: float = 0.9,
        *,
        nnzb: int | None = None,
    ) -> BlockSparseLinear:
        """See [`BlockSparseLinear.from_dense`]; `linear` is a `Conv1D`."""
        straight = nn.Linear(linear.nx, linear.nf, device="meta").train(linear.training)
        straight.weight = nn.Parameter(linear.weight.detach().T, requires_grad=linear.weight.requires_grad)
        straight.bias = linear.bias
        return super().from_dense(straight, block_size, sparsity, nnzb=nnzb)

    def to_linear(self) -> Any:
        """A `Conv1D` with the same outputs."""
        straight = super().to_linear()
        with torch.device("meta"):
            conv = Conv1D(self.out_features, self.in_features).train(self.training)
        conv.weight = nn.Parameter(straight.weight.detach().T.contiguous(), straight.weight.requires_grad)
        conv.bias = straight.bias
        return conv


STOCK_TYPES: dict[type[nn.Module], type[BlockSparseLinear]] = {nn.Linear: SparseLinear, Conv1D: SparseConv1D}

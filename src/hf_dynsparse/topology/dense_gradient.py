"""
The dense gradient of the sparse layers, for scores that ask for it: built at update steps and nowhere else.
"""

from collections.abc import Iterable
from functools import partial

import torch

from ..nn import BlockSparseLinear
from ..ops import observe_weight_gradient


class DenseGradientProbe:
    """
    Sums the dense gradient of each layer's weight over the backward passes between construction and `remove`.

    Costs one dense matrix product and one dense fp32 matrix per layer while it is attached.
    """

    def __init__(self, layers: Iterable[BlockSparseLinear]) -> None:
        self.layers = tuple(layers)
        self.gradients: dict[BlockSparseLinear, torch.Tensor] = {}
        for layer in self.layers:
            observe_weight_gradient(layer.block_index, partial(self._accumulate, layer))

    def _accumulate(self, layer: BlockSparseLinear, grad: torch.Tensor, input: torch.Tensor) -> None:
        product = (grad.T @ input).to(torch.promote_types(grad.dtype, torch.float32))  # [out, in]
        if layer in self.gradients:
            self.gradients[layer] += product
        else:
            self.gradients[layer] = product

    def reduce(self) -> None:
        """
        Sum over the ranks, if there are several. Every rank must call it.

        Raises:
            RuntimeError: if no backward pass went through a layer.
        """
        for layer in self.layers:
            if layer not in self.gradients:
                raise RuntimeError(
                    "The gradient regrow rule must see a backward pass between the previous `step(...)` of the "
                    f"updater and this one. Got none through {layer}. Call `step` once after every optimiser step."
                )
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.all_reduce(self.gradients[layer])

    def blocks(self, layer: BlockSparseLinear) -> torch.Tensor:
        """The gradient of every position, of shape `(block_rows * block_columns, rows, columns)`."""
        dense = self.gradients[layer]
        (block_rows, block_columns), (rows, columns) = layer.grid, layer.block_shape
        return dense.view(block_rows, rows, block_columns, columns).transpose(1, 2).reshape(-1, rows, columns)

    def remove(self) -> None:
        """Detach from the layers and free the gradients."""
        for layer in self.layers:
            observe_weight_gradient(layer.block_index, None)
        self.gradients.clear()

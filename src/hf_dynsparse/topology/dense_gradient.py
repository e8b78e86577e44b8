"""
The dense gradient of the sparse layers, for regrow rules that ask for it: built at update steps and nowhere else.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from ..nn import BlockSparseLinear


class DenseGradientProbe:
    """
    Sums `grad_output.T @ input` of each layer over the backward passes between construction and `remove`.

    Costs one dense matrix product and one dense fp32 matrix per layer while it is attached.
    """

    def __init__(self, layers: Iterable[BlockSparseLinear]) -> None:
        self.gradients: dict[BlockSparseLinear, torch.Tensor] = {}
        self.layers = tuple(layers)
        self._handles: list[RemovableHandle] = [layer.register_forward_hook(self._watch) for layer in self.layers]

    def _watch(self, layer: BlockSparseLinear, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        if not output.requires_grad:
            return
        input = inputs[0].detach()

        def accumulate(grad: torch.Tensor) -> None:
            left = grad.reshape(-1, grad.shape[-1])  # [tokens, out]
            right = input.reshape(-1, input.shape[-1]).to(grad.dtype)  # [tokens, in]
            product = (left.T @ right).float()
            if layer in self.gradients:
                self.gradients[layer] += product
            else:
                self.gradients[layer] = product

        output.register_hook(accumulate)

    def reduce(self) -> None:
        """
        Sum over the ranks, if there are several. Every rank must call it.

        Raises:
            RuntimeError: if no backward pass went through the layer.
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
        """The gradient of every position: `torch.float32` of shape `(block_rows * block_columns, rows, columns)`."""
        dense = self.gradients[layer]
        (block_rows, block_columns), (rows, columns) = layer.grid, layer.block_shape
        return dense.view(block_rows, rows, block_columns, columns).transpose(1, 2).reshape(-1, rows, columns)

    def remove(self) -> None:
        """Detach from the layers and free the gradients."""
        for handle in self._handles:
            handle.remove()
        self.gradients.clear()

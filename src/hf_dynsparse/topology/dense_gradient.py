"""
The dense gradient of the sparse layers, and the scale of what it is made of, for scores that ask for them: taken at
update steps and nowhere else, unless the mean over the steps is asked for.
"""

import weakref
from collections.abc import Callable, Iterable
from functools import partial

import torch

from ..blocks.dense import to_blocks
from ..nn.linear import BlockSparseLinear
from ..ops import observe_weight_gradient


class DenseGradientProbe:
    """
    Sums over the backward passes between construction and `remove`, for each layer, with `gradient` the dense gradient
    of its weight, and with `scales` the squares of its inputs and of the gradients of its outputs, over the tokens
    that the loss depends on.

    The gradient costs one dense matrix product and one dense fp32 matrix per layer while the probe is attached; the
    scales a pass over inputs and gradients, and two vectors. A probe that is dropped is removed.
    """

    def __init__(self, layers: Iterable[BlockSparseLinear], gradient: bool = True, scales: bool = True) -> None:
        self.layers, self.gradient, self.scales = tuple(layers), gradient, scales
        self.gradients: dict[BlockSparseLinear, torch.Tensor] = {}
        self.squares: dict[BlockSparseLinear, tuple[torch.Tensor, torch.Tensor]] = {}
        # Observers belong to the process: they must keep neither a probe nor a model alive.
        probe = weakref.ref(self)
        ends = [
            observe_weight_gradient(layer.block_index, partial(_show, probe, place))
            for place, layer in enumerate(self.layers)
        ]
        self._detach = weakref.finalize(self, _call_all, ends)
        self._detach.atexit = False

    def _accumulate(self, layer: BlockSparseLinear, grad: torch.Tensor, input: torch.Tensor) -> None:
        dtype = torch.promote_types(grad.dtype, torch.float32)
        if self.gradient:
            product = (grad.T @ input).to(dtype)  # [out, in]
            if layer in self.gradients:
                self.gradients[layer] += product
            else:
                self.gradients[layer] = product
        if self.scales:
            self._accumulate_squares(layer, grad, input, dtype)

    def _accumulate_squares(
        self, layer: BlockSparseLinear, grad: torch.Tensor, input: torch.Tensor, dtype: torch.dtype
    ) -> None:
        # Padding has inputs and no gradient: it must not count, or the shape of a batch would.
        used = input * (grad != 0).any(1, keepdim=True)
        of_input, of_output = (torch.linalg.vector_norm(x, dim=0, dtype=dtype).square() for x in (used, grad))
        if layer in self.squares:
            self.squares[layer][0].add_(of_input)
            self.squares[layer][1].add_(of_output)
        else:
            self.squares[layer] = of_input, of_output

    def has_seen(self, layer: BlockSparseLinear) -> bool:
        """Whether a backward pass went through the layer."""
        return layer in self.gradients or layer in self.squares

    def reduce(self) -> None:
        """
        Average over the ranks, if there are several. Every rank must call it.

        Raises:
            RuntimeError: if no backward pass went through a layer.
        """
        for layer in self.layers:
            if not self.has_seen(layer):
                if not layer.values.requires_grad:  # frozen since
                    continue
                raise RuntimeError(
                    "A score of the dense gradient, or of what it is made of, must see a backward pass between the "
                    f"previous `step(...)` of the updater and this one. Got none through {layer}. Call `step` once "
                    "after every optimiser step."
                )
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                product = (self.gradients[layer],) if self.gradient else ()
                for tensor in (*product, *self.squares.get(layer, ())):
                    torch.distributed.all_reduce(tensor)
                    tensor /= torch.distributed.get_world_size()

    def blocks(self, layer: BlockSparseLinear) -> torch.Tensor:
        """The gradient of every position, of shape `(block_rows * block_columns, rows, columns)`."""
        return to_blocks(self.gradients[layer], layer.block_shape).flatten(0, 1)

    def statistics(self, layer: BlockSparseLinear, needs: frozenset[str]) -> dict[str, torch.Tensor]:
        """The fields of `BlockStatistics` in `needs` that the probe knows: `gradient` and the scales."""
        (block_rows, block_columns), (rows, columns) = layer.grid, layer.block_shape
        makers: dict[str, Callable[[], torch.Tensor]] = {
            "gradient": lambda: self.blocks(layer),
            "input_scale": lambda: (
                self.squares[layer][0].sqrt().view(block_columns, 1, columns).repeat(block_rows, 1, 1)
            ),
            "output_scale": lambda: (
                self.squares[layer][1].sqrt().view(-1, rows, 1).repeat_interleave(block_columns, 0)
            ),
        }
        return {name: make() for name, make in makers.items() if name in needs}

    def remove(self) -> None:
        """Detach from the layers and free the gradients."""
        self._detach()
        self.gradients.clear()
        self.squares.clear()


def _show(probe: "weakref.ref[DenseGradientProbe]", place: int, grad: torch.Tensor, input: torch.Tensor) -> None:
    alive = probe()
    if alive is not None:
        alive._accumulate(alive.layers[place], grad, input)


def _call_all(functions: Iterable[Callable[[], None]]) -> None:
    for function in functions:
        function()

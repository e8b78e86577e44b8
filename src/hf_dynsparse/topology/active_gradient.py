"""The gradient of the active blocks at every step, for what is recorded of it: training has computed it anyway."""

import weakref
from collections.abc import Iterable

import torch

from ..nn.linear import BlockSparseLinear
from ..optim.moments import unwrapped
from .records import records_of


class ActiveGradientProbe:
    """
    Shows what is recorded of each layer its gradient before every step of `optimizer` between construction and
    `remove`: summed over micro-batches, averaged over ranks, clipped. A probe that is dropped is removed.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, layers: Iterable[BlockSparseLinear]) -> None:
        shown = tuple(layers)
        handle = unwrapped(optimizer).register_step_pre_hook(lambda *_: _show(shown))
        self.remove = weakref.finalize(self, handle.remove)
        self.remove.atexit = False


def _show(layers: Iterable[BlockSparseLinear]) -> None:
    for layer in layers:
        for record in records_of(layer):
            if record.before_step is not None:
                record.before_step(layer)

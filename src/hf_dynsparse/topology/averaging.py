"""The average of the weights over a run, of blocks rather than of the slots that they are stored in."""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import AveragedModel

from ..nn.linear import BlockSparseLinear, trainable_layers
from .records import untrack_


class TopologyAverage(AveragedModel):
    """
    [`~torch.optim.swa_utils.AveragedModel`] for models whose topology is updated; the arguments are the same.

    A slot of `values` holds another block after an update, and an average slot by slot mixes what belongs to different
    places of the weight. This one moves with the model: a block that was pruned leaves the average too, a new one
    begins at zero as it does in the model, and every active block has the average of its place in the dense weight.
    (One that was pruned and comes back begins anew: what it was before is forgotten, as the model forgets it.)

    `module` is a plain model with the topology of the last call of `update_parameters`.

    Raises:
        ValueError: for values that are split between ranks.

    Example:
        ```python
        average = TopologyAverage(model, multi_avg_fn=get_ema_multi_avg_fn(0.999))
        for step, batch in enumerate(batches, start=1):
            ...
            optimizer.step()
            updater.step(step)
            average.update_parameters(model)
        average.module.save_pretrained("averaged")
        ```
    """

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        split = [name for name, layer in trainable_layers(model).items() if isinstance(layer.values, DTensor)]
        if split:
            raise ValueError(
                f"The weights to average must be whole on every rank. Got `{split[0]}`, which is split between ranks. "
                "Average in one process or under DDP."
            )
        super().__init__(model, *args, **kwargs)
        for layer in trainable_layers(self.module).values():
            untrack_(layer)

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Take the weights of `model` into the average, with its topology as it is now."""
        pairs = list(zip(trainable_layers(self.module).values(), trainable_layers(model).values(), strict=True))
        resized = any(averaged.nnzb != layer.nnzb for averaged, layer in pairs)
        for averaged, layer in pairs:
            _follow_(averaged, layer)
        config: Any = getattr(model, "config", None)
        if resized and config is not None:
            vars(self.module.config).update(copy.deepcopy(vars(config)))
        with _with_equal_buffers(pairs):
            super().update_parameters(model)


def _follow_(averaged: BlockSparseLinear, layer: BlockSparseLinear) -> None:
    """Give `averaged` the topology of `layer`: blocks move to the slots that they have there, new ones are zero."""
    index = layer.block_index.to(averaged.block_index.device)
    if torch.equal(averaged.block_index, index):
        return
    # [block_rows * block_columns, rows, columns] would be dense: only the slots are looked up.
    slot_of = index.new_full((layer.num_blocks,), -1, dtype=torch.int64)
    slot_of[averaged.block_index.long()] = torch.arange(averaged.nnzb, device=index.device)
    slots = slot_of[index.long()]
    old = averaged.values.data
    new = old.new_zeros(len(index), *averaged.block_shape)
    new[slots >= 0] = old[slots[slots >= 0]]
    averaged.values.data, averaged.block_index = new, index.clone()


@contextmanager
def _with_equal_buffers(pairs: Iterable[tuple[BlockSparseLinear, BlockSparseLinear]]) -> Iterator[None]:
    """
    Inside the `with` block the second of each pair has no buffer that the first one lacks, such as what training
    records: `AveragedModel` copies all.
    """
    hidden = [
        (layer, {name: layer._buffers.pop(name) for name in layer._buffers.keys() - averaged._buffers.keys()})
        for averaged, layer in pairs
    ]
    try:
        yield
    finally:
        for layer, buffers in hidden:
            layer._buffers.update(buffers)

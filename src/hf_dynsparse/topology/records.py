"""
What training records of a sparse layer: buffers that checkpoints of a run hold, so that it goes on where it was, and
that finished models do not have.
"""

from collections.abc import Callable, Set
from dataclasses import dataclass

import torch

from ..nn.linear import BlockSparseLinear
from ..nn.shards import gather_rows, local_rows, whole
from .dense_gradient import DenseGradientProbe
from .exploration import packed_map


# Share of the old mean that stays at each step (arXiv:1907.04840 takes the optimiser's, 0.9).
SMOOTHING = 0.9


@dataclass(frozen=True)
class Record:
    """
    Something that is recorded of a layer.

    Args:
        buffer (`str`): its name in the layer and in checkpoints. A new one begins with `recorded_`: a model that is
            loaded from the checkpoint of a run then leaves it out.
        start (`Callable[[BlockSparseLinear], torch.Tensor]`): what it begins with.
        by_slot (`bool`): whether its first side is that of the slots: it then goes along when their number changes,
            and new slots have 0.
        after_step (`Callable[[BlockSparseLinear, DenseGradientProbe], None]`, *optional*): takes in the dense gradient
            of a step, in place; costs a dense gradient at every step.
        before_step (`Callable[[BlockSparseLinear], None]`, *optional*): takes in, in place, the gradient of the active
            blocks, right before the optimiser steps.
        before_update (`Callable[[BlockSparseLinear, torch.Tensor], None]`, *optional*): takes in, in place, what the
            slots that an update is about to prune, of shape `(count,)`, hold.
        after_update (`Callable[[BlockSparseLinear, torch.Tensor, torch.Tensor | float], None]`, *optional*): takes in,
            in place, which slots have new blocks, of shape `(count,)`, and the values that these begin with.
    """

    buffer: str
    start: Callable[[BlockSparseLinear], torch.Tensor]
    by_slot: bool = False
    after_step: Callable[[BlockSparseLinear, DenseGradientProbe], None] | None = None
    before_step: Callable[[BlockSparseLinear], None] | None = None
    before_update: Callable[[BlockSparseLinear, torch.Tensor], None] | None = None
    after_update: Callable[[BlockSparseLinear, torch.Tensor, torch.Tensor | float], None] | None = None


@torch.no_grad()
def add_to_momentum_(layer: BlockSparseLinear, probe: DenseGradientProbe) -> None:
    """Take in the gradient of one step."""
    layer.get_buffer("gradient_momentum").lerp_(probe.blocks(layer).float(), 1.0 - SMOOTHING)


def mean_momentum(layer: BlockSparseLinear) -> float:
    """Mean magnitude over the entries of active blocks."""
    return float(layer.get_buffer("gradient_momentum")[layer.block_index.long()].abs().mean(dtype=torch.float64))


@torch.no_grad()
def add_to_saliency_(layer: BlockSparseLinear) -> None:
    """Add the sum of `|w g|` over each block, if all are finite: under fp16 the optimiser may leave the step out."""
    if layer.values.grad is None:
        return
    values, gradient = (local_rows(tensor)[0].float() for tensor in (layer.values, layer.values.grad))
    of_blocks = gather_rows((values * gradient).abs().sum((1, 2)), layer.values)
    layer.get_buffer("recorded_saliency").add_(of_blocks.where(of_blocks.isfinite().all(), 0.0))


def forget_saliency_(layer: BlockSparseLinear, slots: torch.Tensor, values: torch.Tensor | float) -> None:
    """Begin the sum of the next interval."""
    layer.get_buffer("recorded_saliency").zero_()


@torch.no_grad()
def remember_(layer: BlockSparseLinear, slots: torch.Tensor) -> None:
    """Keep the values of the blocks in `slots` (`torch.int64` of shape `(count,)`), which are about to be pruned."""
    layer.get_buffer("hidden_values")[layer.block_index[slots].long()] = layer.values[slots]


def begin_at_(layer: BlockSparseLinear, slots: torch.Tensor, values: torch.Tensor | float) -> None:
    """Keep what the new blocks in `slots` begin with."""
    first = layer.get_buffer("recorded_first_values")
    first[slots] = values.to(first) if isinstance(values, torch.Tensor) else values


def _zeros(layer: BlockSparseLinear, dtype: torch.dtype) -> torch.Tensor:
    """Of every position: of shape `(block_rows * block_columns, rows, columns)`."""
    return torch.zeros(layer.num_blocks, *layer.block_shape, dtype=dtype, device=layer.block_index.device)


RECORDS: dict[str, Record] = {
    # Which positions were active at any time, one bit each: `torch.uint8` of shape `(ceil(blocks / 8),)`.
    "ever_active": Record("ever_active", packed_map),
    # The updates done when the block of each slot was activated: `torch.int32` of shape `(nnzb,)`.
    "active_since": Record("active_since", lambda layer: torch.zeros_like(layer.block_index), by_slot=True),
    # The running mean of the dense gradient, of every position.
    "momentum": Record("gradient_momentum", lambda layer: _zeros(layer, torch.float32), after_step=add_to_momentum_),
    # The last values of pruned blocks, of every position.
    "hidden_copy": Record("hidden_values", lambda layer: _zeros(layer, layer.values.dtype), before_update=remember_),
    # What active blocks began with: of shape `(nnzb, rows, columns)`.
    "first_values": Record(
        "recorded_first_values",
        lambda layer: whole(layer.values.detach()).clone(),
        by_slot=True,
        after_update=begin_at_,
    ),
    # The sum of `|w g|` over a block and the steps since the last update: `torch.float32` of shape `(nnzb,)`.
    "saliency": Record(
        "recorded_saliency",
        lambda layer: torch.zeros(layer.nnzb, device=layer.block_index.device),
        by_slot=True,
        before_step=add_to_saliency_,
        after_update=forget_saliency_,
    ),
}

# Fields of `BlockStatistics` that are recorded of every slot.
RECORDED = frozenset({"first_values", "saliency"})

# The exploration of every run is recorded (arXiv:2108.06277, section 4).
ALWAYS = frozenset({"ever_active", "active_since"})


def track_(layer: BlockSparseLinear, needs: Set[str] = frozenset()) -> None:
    """
    Begin to record the exploration of `layer`, and those of `needs` that are records; what it records already goes on.
    """
    for name, record in RECORDS.items():
        if name in ALWAYS | needs and record.buffer not in layer._buffers:
            layer.register_buffer(record.buffer, record.start(layer))


def untrack_(layer: BlockSparseLinear) -> None:
    """Take away what training has recorded, if anything: a plain layer is left."""
    for record in RECORDS.values():
        layer._buffers.pop(record.buffer, None)


def records_of(layer: BlockSparseLinear) -> list[Record]:
    """What is recorded of `layer`."""
    return [record for record in RECORDS.values() if record.buffer in layer._buffers]


def recorded(layer: BlockSparseLinear, name: str) -> torch.Tensor:
    """
    What is recorded of `layer` under `name`, of every slot or position.

    Raises:
        ValueError: if it is not recorded.
    """
    buffer = layer._buffers.get(RECORDS[name].buffer)
    if buffer is None:
        raise ValueError(
            f"A score needs {name!r}, which is recorded while a layer trains. Got a layer without it: use "
            f"`TopologyUpdater`, or call `track_(layer, {{{name!r}}})` when training begins."
        )
    return buffer


def after_update_(layer: BlockSparseLinear, slots: torch.Tensor, values: torch.Tensor | float) -> None:
    """Take in which `slots` have new blocks, and the values that these begin with."""
    for record in records_of(layer):
        if record.after_update is not None:
            record.after_update(layer, slots, values)

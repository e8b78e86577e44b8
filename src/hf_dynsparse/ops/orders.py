"""
The active blocks sorted by block row or block column, as kernels walk them; derived once per topology.

A block keeps its slot for the whole run, so kernels find the entries of a row through these orders.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from ..layout import BlockLayout
from .reference import Shape


__all__ = ["BlockOrder", "block_order", "derived"]

Result = TypeVar("Result")


@dataclass(frozen=True)
class BlockOrder:
    """
    The active blocks, row by row or column by column: all `torch.int32`.

    Args:
        offsets (`torch.Tensor` of shape `(block_rows + 1,)` or `(block_columns + 1,)`): start of each row or column.
        rows, columns (`torch.Tensor` of shape `(nnzb,)`): block row and block column of each.
        slots (`torch.Tensor` of shape `(nnzb,)`): its place in `values`.
    """

    offsets: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor
    slots: torch.Tensor


def block_order(block_index: torch.Tensor, shape: Shape, block_shape: Shape, by_column: bool) -> BlockOrder:
    """
    The order of a topology, by row or by column.

    Raises:
        ValueError: if `block_index` names a block that the matrix does not have, or one twice.
    """
    layout = BlockLayout(block_index, shape, block_shape)
    layout.validate()  # an id out of range would read and write foreign memory
    slots = layout.column_order if by_column else layout.row_order
    offsets = layout.column_offsets if by_column else layout.row_offsets
    return BlockOrder(offsets.int(), layout.rows[slots].int(), layout.columns[slots].int(), slots.int())


@dataclass
class _Derived:
    """What was derived from one `block_index` tensor, valid while the tensor is what it was."""

    source: weakref.ref[torch.Tensor]
    state: tuple[int, int, int]
    results: dict[tuple[Any, ...], Any] = field(default_factory=dict)


_derived: dict[int, _Derived] = {}


def derived(derive: Callable[..., Result], block_index: torch.Tensor, *arguments: Any) -> Result:
    """
    `derive(block_index, *arguments)`, computed again only after the tensor has changed. A write through `.data` goes
    unnoticed, as it does in autograd.
    """
    if block_index.is_inference():  # has no version: a change would go unnoticed
        return derive(block_index, *arguments)
    key = id(block_index)
    state = block_index._version, block_index.data_ptr(), block_index.numel()
    entry = _derived.get(key)
    if entry is None or entry.source() is not block_index or entry.state != state:
        entry = _derived[key] = _Derived(weakref.ref(block_index, lambda dead: _evict(key, dead)), state)
    call = derive, *arguments
    if call not in entry.results:
        entry.results[call] = derive(block_index, *arguments)
    return entry.results[call]


def _evict(key: int, dead: weakref.ref[torch.Tensor]) -> None:
    # The id may belong to a newer tensor by now.
    entry = _derived.get(key)
    if entry is not None and entry.source is dead:
        del _derived[key]

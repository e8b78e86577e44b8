"""
The active blocks sorted by block row or block column, as kernels walk them; derived once per topology.

A block keeps its slot for the whole run, so kernels find the entries of a row through these orders.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from ..blocks.layout import BlockLayout
from .reference import Shape


__all__ = ["BlockOrder", "block_order", "check_once", "check_topology", "derived"]

Result = TypeVar("Result")
Wanted = TypeVar("Wanted")


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
    check_topology(block_index, shape, block_shape)  # an id out of range would read and write foreign memory
    layout = BlockLayout(block_index, shape, block_shape)
    slots = layout.column_order if by_column else layout.row_order
    offsets = layout.column_offsets if by_column else layout.row_offsets
    return BlockOrder(offsets.int(), layout.rows[slots].int(), layout.columns[slots].int(), slots.int())


def check_topology(block_index: torch.Tensor, shape: Shape, block_shape: Shape) -> None:
    """
    See [`BlockLayout.validate`]; looked at once per topology.

    Raises:
        ValueError: if `block_index` names a block that the matrix does not have, or one twice.
    """
    derived(_validate, block_index, shape, block_shape)


def _validate(block_index: torch.Tensor, shape: Shape, block_shape: Shape) -> None:
    BlockLayout(block_index, shape, block_shape).validate()


@dataclass
class _Derived:
    """What was derived from one `block_index` tensor, valid while the tensor is what it was."""

    source: weakref.ref[torch.Tensor]
    state: tuple[int, int, int]
    results: dict[tuple[Any, ...], Any] = field(default_factory=dict)
    passed: set[Any] = field(default_factory=set)


_derived: dict[int, _Derived] = {}
_MISSING: Any = object()


def derived(derive: Callable[..., Result], block_index: torch.Tensor, *arguments: Any) -> Result:
    """
    `derive(block_index, *arguments)`, computed again only after the tensor has changed. A write through `.data` goes
    unnoticed, as it does in autograd.
    """
    entry = _entry(block_index)
    if entry is None:
        return derive(block_index, *arguments)
    call = derive, *arguments
    result = entry.results.get(call, _MISSING)
    if result is _MISSING:
        result = entry.results[call] = derive(block_index, *arguments)
    return result


def check_once(check: Callable[[torch.Tensor, Wanted], None], block_index: torch.Tensor, wanted: Wanted) -> None:
    """
    `check(block_index, wanted)`, which raises if it fails, again only after the tensor has changed. In front of every
    product: `derived` would take longer.

    Args:
        wanted (`Any`): found by its identity.
    """
    entry = _entry(block_index)
    if entry is None:
        check(block_index, wanted)
    elif wanted not in entry.passed:
        check(block_index, wanted)
        entry.passed.add(wanted)


def _entry(block_index: torch.Tensor) -> _Derived | None:
    """What is kept of a tensor as it is; `None` if its changes would go unnoticed, since inference gave no version."""
    entry = _derived.get(id(block_index))
    if (
        entry is not None
        and entry.source() is block_index
        and entry.state == (block_index._version, block_index.data_ptr(), block_index.numel())
    ):
        return entry
    return None if block_index.is_inference() else _new_entry(block_index)


def _new_entry(block_index: torch.Tensor) -> _Derived:
    key = id(block_index)
    state = block_index._version, block_index.data_ptr(), block_index.numel()
    entry = _derived[key] = _Derived(weakref.ref(block_index, lambda dead: _evict(key, dead)), state)
    return entry


def _evict(key: int, dead: weakref.ref[torch.Tensor]) -> None:
    # The id may belong to a newer tensor by now.
    entry = _derived.get(key)
    if entry is not None and entry.source is dead:
        del _derived[key]

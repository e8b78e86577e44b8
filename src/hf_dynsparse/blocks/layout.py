"""Which blocks of a matrix are active: the one data layout of the package, and every order derived from it."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import torch

from .sizes import block_grid


Shape = tuple[int, int]
Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class BlockOrder:
    """
    The active blocks as kernels walk them, line by line: a line is a block row, or a block column if `by_column`. All
    `torch.int32`.

    Args:
        offsets (`torch.Tensor` of shape `(lines + 1,)`): first entry of each line.
        rows, columns (`torch.Tensor` of shape `(nnzb,)`): block row and block column of each entry.
        slots (`torch.Tensor` of shape `(nnzb,)`): its place in `values`.
        by_column (`bool`): whether lines are block columns.
    """

    offsets: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor
    slots: torch.Tensor
    by_column: bool

    @property
    def sources(self) -> torch.Tensor:
        """The block of features that each entry reads: its column in a row, its row in a column."""
        return self.rows if self.by_column else self.columns

    @cached_property
    def heaviest(self) -> torch.Tensor:
        """The lines, those with most entries first, `torch.int32` of shape `(lines,)`."""
        return self.offsets.diff().argsort(descending=True, stable=True).int()


@dataclass(frozen=True, eq=False)
class BlockLayout:
    """
    The topology of one matrix. Whatever is derived from it is derived once: take a new layout after a change.

    Args:
        block_index (`torch.Tensor` of shape `(nnzb,)`, `torch.int32`):
            Flat id `row * block_columns + column` of the active block in each slot. Slots are in no particular order:
            a block that is replaced keeps its slot.
        shape (`tuple[int, int]`): `(out_features, in_features)` of the matrix.
        block_shape (`tuple[int, int]`): `(rows, columns)` of one block.
    """

    block_index: torch.Tensor
    shape: Shape
    block_shape: Shape
    results: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)  # of `derived`, by its arguments

    @cached_property
    def grid(self) -> Shape:
        """Number of block rows and block columns."""
        return block_grid(self.shape, self.block_shape)

    @property
    def num_blocks(self) -> int:
        """Number of positions a block can take, active or not."""
        return self.grid[0] * self.grid[1]

    @property
    def nnzb(self) -> int:
        """Number of active blocks."""
        return self.block_index.numel()

    @property
    def density(self) -> float:
        """Share of positions that are active."""
        return self.nnzb / self.num_blocks

    @property
    def rows(self) -> torch.Tensor:
        """Block row of each slot, `torch.int64` of shape `(nnzb,)`."""
        return self.block_index.long() // self.grid[1]

    @property
    def columns(self) -> torch.Tensor:
        """Block column of each slot, `torch.int64` of shape `(nnzb,)`."""
        return self.block_index.long() % self.grid[1]

    @cached_property
    def by_row(self) -> BlockOrder:
        """The active blocks sorted by (row, column)."""
        return self._order(by_column=False)

    @cached_property
    def by_column(self) -> BlockOrder:
        """The active blocks sorted by (column, row): the walk of the transposed matrix."""
        return self._order(by_column=True)

    def _order(self, by_column: bool) -> BlockOrder:
        # No shape here depends on the topology and no number is read, so nothing waits for a GPU.
        lines, across = self.grid[::-1] if by_column else self.grid
        key = self.block_index.int()
        if by_column:
            key = key % self.grid[1] * self.grid[0] + key // self.grid[1]
        key, slots = key.sort()
        starts = torch.arange(lines + 1, dtype=key.dtype, device=key.device) * across
        offsets = torch.searchsorted(key, starts, out_int32=True)
        line, source = key // across, key % across
        rows, columns = (source, line) if by_column else (line, source)
        return BlockOrder(offsets, rows, columns, slots.int(), by_column)

    def derived(self, derive: Callable[..., Result], *arguments: Any) -> Result:
        """`derive(self, *arguments)`, computed once. The result must not hold the layout."""
        call = derive, *arguments
        if call not in self.results:
            self.results[call] = derive(self, *arguments)
        result: Result = self.results[call]
        return result

    def to_mask(self) -> torch.Tensor:
        """Boolean map of the active blocks, of shape `(block_rows, block_columns)`."""
        active = torch.zeros(self.num_blocks, dtype=torch.bool, device=self.block_index.device)
        active[self.block_index.long()] = True
        return active.view(self.grid)

    def validate(self, name: str = "the layer") -> None:
        """
        Check that the index is 32-bit, in range and without repetition. Looks at the index anew at each call.

        Raises:
            ValueError: naming the layer and the first offending slot.
        """
        index = self.block_index
        if index.dtype != torch.int32 or index.dim() != 1:
            raise ValueError(
                f"`block_index` of {name} must be a 1-D int32 tensor. Got {index.dtype} of shape "
                f"{tuple(index.shape)}. The checkpoint is damaged: load an intact one."
            )
        ordered = index.sort().values
        first, last, repeats = ordered[:1] < 0, ordered[-1:] >= self.num_blocks, ordered[1:] == ordered[:-1]
        if not torch.cat([first, last, repeats]).any():  # a single wait, where the index is on a GPU
            return
        outside = ((index < 0) | (index >= self.num_blocks)).nonzero()
        if outside.numel():
            slot = int(outside[0])
            raise ValueError(
                f"`block_index` of {name} must lie in [0, {self.num_blocks}). Got {int(index[slot])} in slot {slot}. "
                "The checkpoint is damaged: load an intact one."
            )
        raise ValueError(
            f"`block_index` of {name} must name each block once. Got {int(ordered[1:][repeats][0])} twice. "
            "The checkpoint is damaged: load an intact one."
        )


@dataclass(frozen=True, eq=False)
class _Known:
    """The layouts of one `block_index` tensor, valid while the tensor is what it was."""

    source: weakref.ref[torch.Tensor]
    state: tuple[int, int, int]
    layouts: dict[Any, BlockLayout] = field(default_factory=dict)


_known: dict[int, _Known] = {}


def layout_of(block_index: torch.Tensor, shape: Shape, block_shape: Shape) -> BlockLayout:
    """
    The layout of a `block_index`, made again only after the tensor has changed. A write through `.data` goes
    unnoticed, as it does in autograd.
    """
    layouts = layouts_of(block_index)
    layout = layouts.get((shape, block_shape))
    if layout is None:
        # An alias: the layout must not keep the tensor alive whose end is its own.
        layout = layouts[shape, block_shape] = BlockLayout(block_index.detach(), shape, block_shape)
    return layout


def layouts_of(block_index: torch.Tensor) -> dict[Any, BlockLayout]:
    """The layouts that are known of a `block_index` as it is now, to be looked up and added to."""
    known = _known.get(id(block_index))
    if (
        known is not None
        and known.source() is block_index
        and known.state == (block_index._version, block_index.data_ptr(), block_index.numel())
        and not (block_index.is_cuda and torch.cuda.is_current_stream_capturing())
    ):
        return known.layouts
    # Changes of an inference tensor would go unnoticed: it has no version. A captured graph replays kernels and no
    # Python, so it must derive its orders itself, or it would keep those of the topology at its capture.
    if block_index.is_inference() or (block_index.is_cuda and torch.cuda.is_current_stream_capturing()):
        return {}
    key = id(block_index)
    state = block_index._version, block_index.data_ptr(), block_index.numel()
    known = _known[key] = _Known(weakref.ref(block_index, lambda dead: _forget(key, dead)), state)
    return known.layouts


def _forget(key: int, dead: weakref.ref[torch.Tensor]) -> None:
    # The id may belong to a newer tensor by now.
    known = _known.get(key)
    if known is not None and known.source is dead:
        del _known[key]

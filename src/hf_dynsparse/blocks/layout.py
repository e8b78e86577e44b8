"""Which blocks of a matrix are active: the one data layout of the package, and every order derived from it."""

from dataclasses import dataclass
from functools import cached_property

import torch

from .sizes import block_grid


@dataclass(frozen=True, eq=False)
class BlockLayout:
    """
    The topology of one matrix.

    Args:
        block_index (`torch.Tensor` of shape `(nnzb,)`, `torch.int32`):
            Flat id `row * block_columns + column` of the active block in each slot. Slots are in no particular order:
            a block that is replaced keeps its slot.
        shape (`tuple[int, int]`): `(out_features, in_features)` of the matrix.
        block_shape (`tuple[int, int]`): `(rows, columns)` of one block.
    """

    block_index: torch.Tensor
    shape: tuple[int, int]
    block_shape: tuple[int, int]

    @property
    def grid(self) -> tuple[int, int]:
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

    @cached_property
    def rows(self) -> torch.Tensor:
        """Block row of each slot, `torch.int64` of shape `(nnzb,)`."""
        return self.block_index.long() // self.grid[1]

    @cached_property
    def columns(self) -> torch.Tensor:
        """Block column of each slot, `torch.int64` of shape `(nnzb,)`."""
        return self.block_index.long() % self.grid[1]

    @cached_property
    def row_order(self) -> torch.Tensor:
        """Slots sorted by (row, column), `torch.int64` of shape `(nnzb,)`."""
        return self.block_index.argsort()

    @cached_property
    def column_order(self) -> torch.Tensor:
        """Slots sorted by (column, row): the walk of the transposed matrix, `torch.int64` of shape `(nnzb,)`."""
        return (self.columns * self.grid[0] + self.rows).argsort()

    @cached_property
    def row_offsets(self) -> torch.Tensor:
        """Start of each block row in `row_order`, `torch.int64` of shape `(block_rows + 1,)`."""
        return _offsets(self.rows, self.grid[0])

    @cached_property
    def column_offsets(self) -> torch.Tensor:
        """Start of each block column in `column_order`, `torch.int64` of shape `(block_columns + 1,)`."""
        return _offsets(self.columns, self.grid[1])

    def to_mask(self) -> torch.Tensor:
        """Boolean map of the active blocks, of shape `(block_rows, block_columns)`."""
        active = torch.zeros(self.num_blocks, dtype=torch.bool, device=self.block_index.device)
        active[self.block_index.long()] = True
        return active.view(self.grid)

    def validate(self, name: str = "the layer") -> None:
        """
        Check that the index is 32-bit, in range and without repetition. Off the hot path: called at load and train
        begin.

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


def _offsets(lines: torch.Tensor, count: int) -> torch.Tensor:
    ends = torch.bincount(lines, minlength=count).cumsum(0)
    return torch.cat([ends.new_zeros(1), ends])

"""Which blocks of a matrix are active: the one data layout of the package, and every order derived from it."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from math import floor

import torch


Sides = int | tuple[int, int] | list[int]
BlockSize = Sides | dict[str, Sides]  # one for all layers, or by patterns of their names

# As written on a command line: sides, and sides for a pattern.
_SIDES = r"\d+(?:x\d+)?"
_NAMED = rf"[^=,]+={_SIDES}"


def as_block_shape(block_size: Sides) -> tuple[int, int]:
    """
    Read a block size: an int `B` means square `B x B` blocks, a pair means `(rows, columns)`.

    Raises:
        ValueError: if a side is not a positive integer.
    """
    sides = tuple(block_size) if isinstance(block_size, tuple | list) else (block_size, block_size)
    if len(sides) != 2 or not all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in sides):
        raise ValueError(
            "`block_size` must be a positive integer or a pair of them (rows, columns). "
            f"Got {block_size!r}. Choose for example 1, 4, 16 or (1, 4)."
        )
    return sides


def parse_block_size(text: str) -> BlockSize:
    """
    Read a block size from a command line: `"16"`, `"1x4"` for rows x columns, or `"*attention*=4,*=16"` for sizes by
    patterns of layer names.

    Raises:
        ValueError: if it is none of them.
    """
    if not re.fullmatch(rf"{_SIDES}|{_NAMED}(?:,{_NAMED})*", text):
        raise ValueError(
            "`--block_size` must be a number such as 16, two such as 1x4, or sizes by layer names such as "
            f"*attention*=4,*=16. Got {text!r}."
        )
    if "=" not in text:
        return _read_sides(text)
    return {pattern: _read_sides(size) for pattern, size in (part.split("=") for part in text.split(","))}


def _read_sides(text: str) -> Sides:
    rows, columns = as_block_shape([int(side) for side in (text.split("x") * 2)[:2]])
    return (rows, columns) if "x" in text else rows


def block_shapes_of(names: Iterable[str], block_size: BlockSize) -> dict[str, tuple[int, int]]:
    """
    The block shape of each layer of `names`. Of a mapping, the longest pattern that matches a name gives its size: the
    order of entries does not survive in a config.json, which is sorted.

    Args:
        block_size (`int`, `tuple[int, int]` or `dict[str, int | tuple[int, int]]`): one for all, or by shell-style
            patterns of names, such as `{"*attention*": 4, "*": 16}`.

    Raises:
        ValueError: for a pattern without a layer, or a layer without a pattern.
    """
    if not isinstance(block_size, dict):
        return dict.fromkeys(names, as_block_shape(block_size))
    shapes, unused = {}, set(block_size)
    for name in names:
        matching = [pattern for pattern in block_size if fnmatchcase(name, pattern)]
        if not matching:
            raise ValueError(
                f"`block_size` must give a size for every layer. Got none for `{name}` among {', '.join(block_size)}. "
                "Add the pattern `*`."
            )
        unused.difference_update(matching)
        shapes[name] = as_block_shape(block_size[max(matching, key=lambda pattern: (len(pattern), pattern))])
    if unused:
        raise ValueError(
            f"Every pattern of `block_size` must match a layer. Got {min(unused)!r}. Layers of this model: "
            f"{', '.join([*shapes][:6])}, ..."
        )
    return shapes


def block_grid(shape: tuple[int, int], block_shape: tuple[int, int], name: str = "the matrix") -> tuple[int, int]:
    """
    Number of block rows and block columns of a matrix of `shape` `(out_features, in_features)`.

    Raises:
        ValueError: if the block does not divide both sides; `name` says which matrix.
    """
    (height, width), (rows, columns) = shape, block_shape
    if height % rows or width % columns:
        fits = [side for side in (64, 32, 16, 8, 4, 2, 1) if height % side == 0 and width % side == 0]
        raise ValueError(
            f"`block_size` must divide both sides of {name} ({height} x {width}). "
            f"Got {rows} x {columns}. Choose {', '.join(map(str, fits[::-1]))}."
        )
    return height // rows, width // columns


def check_sparsity(sparsity: float) -> float:
    """
    Return `sparsity` if it lies in [0, 1).

    Raises:
        ValueError: if it does not.
    """
    if not 0.0 <= sparsity < 1.0:
        raise ValueError(
            f"`sparsity` is the share of inactive positions and must lie in [0, 1). Got {sparsity}. "
            "Choose 0.9 to keep one position in ten."
        )
    return sparsity


def count_active_blocks(num_blocks: int, density: float) -> int:
    """
    Number of active blocks of a tensor, rounded half up and at least one: `max(1, floor(density * blocks + 1/2))`.
    """
    return min(num_blocks, max(1, floor(density * num_blocks + 0.5)))


def random_block_index(
    num_blocks: int,
    nnzb: int,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """
    Draw `nnzb` different block ids uniformly, in ascending order: `torch.int32` of shape `(nnzb,)` (§3.1, always
    sparse).
    """
    drawn = torch.randperm(num_blocks, generator=generator, device=generator.device if generator else "cpu")
    return drawn[:nnzb].sort().values.to(device=device, dtype=torch.int32)


def balanced_block_index(
    grid: tuple[int, int],
    nnzb: int,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """
    Draw `nnzb` different block ids at random, in ascending order, such that all block rows of `grid` hold as many as
    each other, to within one, and so do all block columns: `torch.int32` of shape `(nnzb,)`. Where few blocks are
    active, a uniform draw leaves rows or columns empty, and their outputs or inputs unused.
    """
    rows, columns = grid
    where = generator.device if generator else torch.device("cpu")
    order = torch.randperm(rows, generator=generator, device=where)
    active = torch.zeros(grid, dtype=torch.bool, device=where)
    load = torch.zeros(columns, dtype=torch.float64, device=where)  # exact when a draw is added
    for turn, row in enumerate(order.tolist()):
        # Each row takes the emptiest columns, of equally empty ones any: their loads never differ by more than one.
        preference = load + torch.rand(columns, generator=generator, device=where)
        count = nnzb // rows + (turn < nnzb % rows)
        taken = preference.topk(count, largest=False).indices
        active[row, taken] = True
        load[taken] += 1
    return active.flatten().nonzero().squeeze(1).to(device=device, dtype=torch.int32)


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

"""
The general backend: any block shape, density, dtype and device, in plain PyTorch.

Some block rows (or columns) at a time are scattered into a dense tile and multiplied by the library's matrix product.
A tile holds about half of a layer's weight or `TILE_ENTRIES` entries, whichever is less, so the dense weight and its
dense gradient never exist whole; the time is that of the dense layer. Bit-reproducible: there are no atomic additions.
"""

from collections.abc import Iterator

import torch

from ..blocks.dense import from_blocks, to_blocks
from ..blocks.layout import BlockLayout
from .reference import Shape, why_not


__all__ = ["dds", "sdd", "why_not"]

# 4 MiB in fp32: large enough for an efficient product, small beside the activations of one layer.
TILE_ENTRIES = 1 << 20


def dds(
    input: torch.Tensor, values: torch.Tensor, layout: BlockLayout, bias: torch.Tensor | None, transposed: bool
) -> torch.Tensor:
    """`input @ W.T + bias`, or `input @ W` if `transposed` (the input gradient); see `reference.dds`."""
    output = input.new_empty(input.shape[0], layout.shape[transposed])
    # Tiles of block columns for the transposed product: each output column is written once, so never rounded twice.
    for first, last in _tiles(layout.shape, layout.block_shape[transposed], transposed):
        tile = _scatter(values, layout, first, last, transposed)
        torch.mm(input, tile if transposed else tile.T, out=output[:, first:last])
    return output if bias is None else output.add_(bias)


def sdd(grad: torch.Tensor, input: torch.Tensor, layout: BlockLayout) -> torch.Tensor:
    """The active blocks of `grad.T @ input`; see `reference.sdd`."""
    (rows, columns), row, column = layout.block_shape, layout.rows, layout.columns
    output = input.new_empty(layout.nnzb, rows, columns)
    for first, last in _tiles(layout.shape, rows, False):
        tile = to_blocks(grad[:, first:last].T @ input, layout.block_shape)
        inside = (row >= first // rows) & (row < last // rows)
        blocks = tile[torch.where(inside, row - first // rows, 0), column]  # [nnzb, rows, columns]
        output = torch.where(inside[:, None, None], blocks, output)
    return output


def _tiles(shape: Shape, side: int, by_column: bool) -> Iterator[tuple[int, int]]:
    """First and last output row, or column, of each tile; `side` is that of a block."""
    length = shape[by_column]
    count = max(2, -(-shape[0] * shape[1] // TILE_ENTRIES))
    step = side * -(-(length // side) // count)
    for first in range(0, length, step):
        yield first, min(first + step, length)


def _scatter(values: torch.Tensor, layout: BlockLayout, first: int, last: int, by_column: bool) -> torch.Tensor:
    """The dense rows, or columns, `first` to `last` of the weight."""
    side = layout.block_shape[by_column]
    start, stop = first // side, last // side
    line = layout.columns if by_column else layout.rows
    inside = (line >= start) & (line < stop)
    if by_column:
        local, height, width = layout.rows * (stop - start) + line - start, layout.grid[0], stop - start
    else:
        local, height, width = (line - start) * layout.grid[1] + layout.columns, stop - start, layout.grid[1]
    # Blocks of other tiles land in one spare block: no shape depends on the data, so nothing waits for a GPU.
    local = torch.where(inside, local, height * width)
    blocks = values.new_zeros(height * width + 1, *layout.block_shape).index_copy_(0, local, values)
    return from_blocks(blocks[:-1].view(height, width, *layout.block_shape))

"""
The general backend: any block shape, density, dtype and device, in plain PyTorch.

Some block rows (or columns) at a time are scattered into a dense tile and multiplied by the library's matrix product.
A tile holds about half of a layer's weight or `TILE_ENTRIES` entries, whichever is less, so the dense weight and its
dense gradient never exist whole; the time is that of the dense layer. Bit-reproducible: there are no atomic additions.
"""

from collections.abc import Iterator

import torch

from .reference import Shape, why_not


__all__ = ["dds", "sdd", "why_not"]

# 4 MiB in fp32: large enough for an efficient product, small beside the activations of one layer.
TILE_ENTRIES = 1 << 20


def dds(
    input: torch.Tensor,
    values: torch.Tensor,
    block_index: torch.Tensor,
    bias: torch.Tensor | None,
    shape: Shape,
    transposed: bool,
) -> torch.Tensor:
    """
    `input @ W.T + bias`, or `input @ W` if `transposed` (the input gradient); see `reference.dds`.
    """
    width = shape[1] if transposed else shape[0]
    output = input.new_empty(input.shape[0], width)
    # Tiles of block columns for the transposed product: each output column is written once, so never rounded twice.
    for first, last in _tiles(shape, values.shape[1 + transposed], transposed):
        tile = _scatter(values, block_index, shape, first, last, transposed)
        torch.mm(input, tile if transposed else tile.T, out=output[:, first:last])
    return output if bias is None else output.add_(bias)


def sdd(
    grad: torch.Tensor, input: torch.Tensor, block_index: torch.Tensor, shape: Shape, block_shape: Shape
) -> torch.Tensor:
    """The active blocks of `grad.T @ input`; see `reference.sdd`."""
    rows, columns = block_shape
    block_columns = shape[1] // columns
    index = block_index.long()
    row, column = index // block_columns, index % block_columns
    output = input.new_empty(block_index.numel(), rows, columns)
    for first, last in _tiles(shape, rows, False):
        tile = (grad[:, first:last].T @ input).view(-1, rows, block_columns, columns)
        inside = (row >= first // rows) & (row < last // rows)
        blocks = tile[torch.where(inside, row - first // rows, 0), :, column]  # [nnzb, rows, columns]
        output = torch.where(inside[:, None, None], blocks, output)
    return output


def _tiles(shape: Shape, side: int, by_column: bool) -> Iterator[tuple[int, int]]:
    """First and last output row, or column, of each tile; `side` is that of a block."""
    length = shape[by_column]
    count = max(2, -(-shape[0] * shape[1] // TILE_ENTRIES))
    step = side * -(-(length // side) // count)
    for first in range(0, length, step):
        yield first, min(first + step, length)


def _scatter(
    values: torch.Tensor, block_index: torch.Tensor, shape: Shape, first: int, last: int, by_column: bool
) -> torch.Tensor:
    """The dense rows, or columns, `first` to `last` of the weight."""
    _, rows, columns = values.shape
    block_rows, block_columns = shape[0] // rows, shape[1] // columns
    index = block_index.long()
    row, column = index // block_columns, index % block_columns
    if by_column:
        start, stop = first // columns, last // columns
        inside = (column >= start) & (column < stop)
        local, height, width = row * (stop - start) + column - start, block_rows, stop - start
    else:
        start, stop = first // rows, last // rows
        inside = (row >= start) & (row < stop)
        local, height, width = index - start * block_columns, stop - start, block_columns
    # Blocks of other tiles land in one spare block: no shape depends on the data, so nothing waits for a GPU.
    local = torch.where(inside, local, height * width)
    blocks = values.new_zeros(height * width + 1, rows, columns).index_copy_(0, local, values)
    return blocks[:-1].view(height, width, rows, columns).transpose(1, 2).reshape(height * rows, width * columns)

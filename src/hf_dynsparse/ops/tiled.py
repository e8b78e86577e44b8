"""
The general backend: any block shape, density, dtype and device, in plain PyTorch.

A tile of some block rows is scattered into a dense workspace and multiplied by the library's matrix product. A tile
holds at most half of a layer's weight and at most `TILE_ENTRIES` entries, so neither the dense weight nor its dense
gradient ever exists; the time is that of the dense layer. Bit-reproducible: there are no atomic additions.
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
    `input @ W.T + bias`, or `input @ W` if `transposed` (the input gradient); see `hf_dynsparse.ops.operators.dds`.
    """
    output = input.new_empty(input.shape[0], shape[1] if transposed else shape[0])
    for first, last in _tiles(shape, values.shape[1]):
        tile = _scatter(values, block_index, shape[1], first, last)  # [last - first, in_features]
        if not transposed:
            torch.mm(input, tile.T, out=output[:, first:last])
        elif first == 0:
            torch.mm(input[:, first:last], tile, out=output)
        else:
            output.addmm_(input[:, first:last], tile)
    return output if bias is None else output.add_(bias)


def sdd(
    grad: torch.Tensor, input: torch.Tensor, block_index: torch.Tensor, shape: Shape, block_shape: Shape
) -> torch.Tensor:
    """The active blocks of `grad.T @ input`; see `hf_dynsparse.ops.operators.sdd`."""
    rows, columns = block_shape
    block_columns = shape[1] // columns
    output = input.new_empty(block_index.numel(), rows, columns)
    for first, last in _tiles(shape, rows):
        tile = grad[:, first:last].T @ input
        local, inside = _local_index(block_index, first // rows * block_columns, last // rows * block_columns)
        local = torch.where(inside, local, 0)
        blocks = tile.view(-1, rows, block_columns, columns)[local // block_columns, :, local % block_columns]
        output = torch.where(inside[:, None, None], blocks, output)
    return output


def _tiles(shape: Shape, rows: int) -> Iterator[tuple[int, int]]:
    """First and last output row of each tile."""
    count = max(2, -(-shape[0] * shape[1] // TILE_ENTRIES))
    height = rows * -(-(shape[0] // rows) // count)
    for first in range(0, shape[0], height):
        yield first, min(first + height, shape[0])


def _local_index(block_index: torch.Tensor, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Block ids relative to `start`, and which of them lie before `stop`."""
    index = block_index.long()
    return index - start, (index >= start) & (index < stop)


def _scatter(values: torch.Tensor, block_index: torch.Tensor, width: int, first: int, last: int) -> torch.Tensor:
    """Dense output rows `first` to `last` of the weight."""
    _, rows, columns = values.shape
    block_columns = width // columns
    start, stop = first // rows * block_columns, last // rows * block_columns
    local, inside = _local_index(block_index, start, stop)
    # Blocks of other tiles land in one spare block: no shape depends on the data, so nothing waits for a GPU.
    local = torch.where(inside, local, stop - start)
    blocks = values.new_zeros(stop - start + 1, rows, columns).index_copy_(0, local, values)
    return blocks[:-1].view(-1, block_columns, rows, columns).transpose(1, 2).reshape(last - first, width)

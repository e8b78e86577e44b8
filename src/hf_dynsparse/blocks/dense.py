"""A dense matrix cut into blocks, and put together again."""

import torch


def to_blocks(dense: torch.Tensor, block_shape: tuple[int, int]) -> torch.Tensor:
    """
    The blocks of a matrix by block row and block column: a view.

    Args:
        dense (`torch.Tensor` of shape `(block_rows * rows, block_columns * columns)`).
        block_shape (`tuple[int, int]`): `(rows, columns)` of one block.

    Returns:
        `torch.Tensor` of shape `(block_rows, block_columns, rows, columns)`.
    """
    rows, columns = block_shape
    # [block_rows, rows, block_columns, columns] -> [block_rows, block_columns, rows, columns]
    return dense.view(dense.shape[0] // rows, rows, dense.shape[1] // columns, columns).transpose(1, 2)


def from_blocks(blocks: torch.Tensor) -> torch.Tensor:
    """
    The matrix of shape `(block_rows * rows, block_columns * columns)` whose [`to_blocks`] are `blocks`
    (`torch.Tensor` of shape `(block_rows, block_columns, rows, columns)`).
    """
    block_rows, block_columns, rows, columns = blocks.shape
    return blocks.transpose(1, 2).reshape(block_rows * rows, block_columns * columns)

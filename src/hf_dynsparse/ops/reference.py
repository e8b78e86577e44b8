"""The slow, obvious products: build the dense matrix, multiply. Every other backend is tested against this file."""

import torch

from ..blocks.dense import from_blocks, to_blocks
from ..blocks.layout import BlockLayout


Shape = tuple[int, int]


def to_dense(values: torch.Tensor, block_index: torch.Tensor, shape: Shape) -> torch.Tensor:
    """
    The dense matrix, zero where no block is active; differentiable in `values`.

    Args:
        values (`torch.Tensor` of shape `(nnzb, rows, columns)`): the active blocks.
        block_index (`torch.Tensor` of shape `(nnzb,)`): flat block ids.
        shape (`tuple[int, int]`): `(out_features, in_features)`.

    Returns:
        `torch.Tensor` of shape `(out_features, in_features)`.
    """
    _, rows, columns = values.shape
    block_rows, block_columns = shape[0] // rows, shape[1] // columns
    # Not `index_put`, which writes a single block in many places, and counts negative ids from the end.
    blocks = values.new_zeros(block_rows * block_columns, rows, columns).index_copy(0, block_index.long(), values)
    return from_blocks(blocks.view(block_rows, block_columns, rows, columns))


def take_blocks(dense: torch.Tensor, block_index: torch.Tensor, block_shape: Shape) -> torch.Tensor:
    """The blocks of `dense` `(out_features, in_features)` named by `block_index`: shape `(nnzb, rows, columns)`."""
    blocks, index = to_blocks(dense, block_shape), block_index.long()
    return blocks[index // blocks.shape[1], index % blocks.shape[1]]


def why_not(device: torch.device, dtype: torch.dtype, block_shape: Shape) -> str | None:
    """Why these operands cannot be served, or `None` if they can: they always can."""
    return None


def dds(
    input: torch.Tensor, values: torch.Tensor, layout: BlockLayout, bias: torch.Tensor | None, transposed: bool
) -> torch.Tensor:
    """
    Dense = dense x sparse: `input @ W.T + bias`, or `input @ W` if `transposed` (the input gradient).

    Names give the density of output and operands, output first: dds here, sdd (sparse = dense x dense) below.

    Args:
        input (`torch.Tensor` of shape `(tokens, in_features)`, or `(tokens, out_features)` if `transposed`).
        values (`torch.Tensor` of shape `(nnzb, rows, columns)`): the active blocks of `W`, of the dtype of `input`.
        layout (`BlockLayout`): where they are.
        bias (`torch.Tensor` of shape `(out_features,)`, *optional*).

    Returns:
        `torch.Tensor` of shape `(tokens, out_features)`, or `(tokens, in_features)` if `transposed`.
    """
    weight = to_dense(values, layout.block_index, layout.shape)
    output = input @ (weight if transposed else weight.T)
    return output if bias is None else output + bias


def sdd(grad: torch.Tensor, input: torch.Tensor, layout: BlockLayout) -> torch.Tensor:
    """
    Sparse = dense x dense: the active blocks of `grad.T @ input`, which are the gradient of `values`.

    Args:
        grad (`torch.Tensor` of shape `(tokens, out_features)`).
        input (`torch.Tensor` of shape `(tokens, in_features)`).
        layout (`BlockLayout`): which blocks are wanted.

    Returns:
        `torch.Tensor` of shape `(nnzb, rows, columns)`.
    """
    return take_blocks(grad.T @ input, layout.block_index, layout.block_shape)

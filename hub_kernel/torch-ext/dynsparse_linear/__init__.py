"""
Linear layers with block-sparse weights on NVIDIA GPUs, in Triton: what `kernels.get_kernel` loads. `blocks` and `ops`
beside this file are copies of those of hf_dynsparse.
"""

import torch

from .blocks.layout import BlockLayout, layouts_of
from .ops.checks import check_block_index, check_linear, facts_of, find_weight
from .ops.reference import to_dense
from .ops.triton import dds, sdd, why_not


__all__ = ["BlockLayout", "block_sparse_linear", "dds", "sdd", "to_dense", "why_not"]


def block_sparse_linear(
    input: torch.Tensor,
    values: torch.Tensor,
    block_index: torch.Tensor,
    bias: torch.Tensor | None,
    out_features: int,
) -> torch.Tensor:
    """
    `torch.nn.functional.linear` with a block-sparse weight; differentiable once.

    Args:
        input (`torch.Tensor` of shape `(..., in_features)`).
        values (`torch.Tensor` of shape `(nnzb, side, side)`): the active blocks.
        block_index (`torch.Tensor` of shape `(nnzb,)`, `torch.int32`): flat id `row * block_columns + column` of each.
        bias (`torch.Tensor` of shape `(out_features,)`, *optional*).

    Returns:
        `torch.Tensor` of shape `(..., out_features)`.

    Raises:
        ValueError: if sizes, dtypes or devices do not fit together or are not served, or a block id names no block, or
            one twice.
    """
    flat = input.reshape(-1, input.shape[-1])  # [tokens, in_features]
    check_linear(facts_of(flat), facts_of(values), None if bias is None else facts_of(bias), out_features)
    nnzb, rows, columns = values.shape
    reason = why_not(flat.device, flat.dtype, (rows, columns))
    if reason is not None:
        raise ValueError(f"This kernel {reason}. Got {flat.dtype} on {flat.device} in blocks of {rows} x {columns}.")
    weight = find_weight((out_features, flat.shape[1]), (rows, columns), nnzb, flat.device)
    layout = layouts_of(block_index).get(weight) or check_block_index(block_index, weight)
    return _Linear.apply(flat, values, bias, layout).view(*input.shape[:-1], out_features)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, values, bias, layout):
        ctx.save_for_backward(input, values)
        ctx.layout = layout
        return dds(input, values, layout, bias, False)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        input, values = ctx.saved_tensors
        of_input, of_values, of_bias, _ = ctx.needs_input_grad
        return (
            dds(grad, values, ctx.layout, None, True) if of_input else None,
            sdd(grad, input, ctx.layout) if of_values else None,
            grad.sum(0) if of_bias else None,
            None,
        )

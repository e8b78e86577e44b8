"""
Sparse products in a few lines of PyTorch: `hf_dynsparse.ops` of a model that brings its own code.

A dense weight exists for the time of one product. The kernels of hf_dynsparse need none, and much less time.
"""

from typing import Any

import torch

from ...blocks.layout import BlockLayout
from ...ops.reference import dds, sdd, to_dense


__all__ = ["Problem", "block_sparse_linear", "describe_choice", "to_dense"]


class _Linear(torch.autograd.Function):
    """Keeps the active blocks for the backward pass, not the dense weight."""

    @staticmethod
    def forward(ctx, input, values, block_index, bias, shape):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(input, values)
        ctx.layout = BlockLayout(block_index, shape, tuple(values.shape[1:]))
        return dds(input, values, ctx.layout, bias, False)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        input, values = ctx.saved_tensors
        of_input, of_values, _, of_bias, _ = ctx.needs_input_grad
        return (
            dds(grad, values, ctx.layout, None, True) if of_input else None,
            sdd(grad, input, ctx.layout) if of_values else None,
            None,
            grad.sum(0) if of_bias else None,
            None,
        )


def block_sparse_linear(
    input: torch.Tensor,
    values: torch.Tensor,
    block_index: torch.Tensor,
    bias: torch.Tensor | None,
    out_features: int,
) -> torch.Tensor:
    """`input` of shape `(..., in_features)` to `(..., out_features)`; takes part in autocast."""
    device = input.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        input, values = input.to(dtype), values.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    shape = out_features, input.shape[-1]
    output = _Linear.apply(input.reshape(-1, shape[1]), values, block_index, bias, shape)
    return output.view(*input.shape[:-1], out_features)


class Problem:
    """There is nothing to choose by."""

    @classmethod
    def make(cls, *description: Any) -> "Problem":
        """The same for every layer."""
        return cls()


def describe_choice(problem: Problem) -> tuple[str, str]:
    """Which backend serves a layer, and why."""
    return "plain", "a transient dense weight; `pip install hf_dynsparse` for sparse kernels"

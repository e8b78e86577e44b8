"""
The two products as PyTorch operators, with their gradients: opaque to `torch.compile`, so that a topology update
changes no traced shape and causes no recompilation.

Names give the density of output and operands, output first: dds is dense = dense x sparse, sdd is sparse = dense x
dense.
"""

from collections.abc import Callable

import torch

from .backends import choose_backend


@torch.library.custom_op("hf_dynsparse::dds", mutates_args=())
def dds(
    input: torch.Tensor,
    values: torch.Tensor,
    block_index: torch.Tensor,
    bias: torch.Tensor | None,
    out_features: int,
    in_features: int,
    transposed: bool,
) -> torch.Tensor:
    """
    Dense = dense x sparse: `input @ W.T + bias`, or `input @ W` if `transposed`, with `W` of shape `(out, in)`.

    Args:
        input (`torch.Tensor` of shape `(tokens, in_features)`, or `(tokens, out_features)` if `transposed`).
        values (`torch.Tensor` of shape `(nnzb, rows, columns)`): the active blocks, of the dtype of `input`.
        block_index (`torch.Tensor` of shape `(nnzb,)`, `torch.int32`): their flat ids.
        bias (`torch.Tensor` of shape `(out_features,)`, *optional*).

    Returns:
        `torch.Tensor` of shape `(tokens, out_features)`, or `(tokens, in_features)` if `transposed`.
    """
    rows, columns = values.shape[1:]
    density = values.numel() / (out_features * in_features)
    backend = choose_backend(input.device, input.dtype, (rows, columns), density)
    return backend.dds(input, values, block_index, bias, (out_features, in_features), transposed)


@torch.library.custom_op("hf_dynsparse::sdd", mutates_args=())
def sdd(
    grad: torch.Tensor,
    input: torch.Tensor,
    block_index: torch.Tensor,
    rows: int,
    columns: int,
) -> torch.Tensor:
    """
    Sparse = dense x dense: the active blocks of `grad.T @ input`, i.e. the gradient of `values`.

    Args:
        grad (`torch.Tensor` of shape `(tokens, out_features)`).
        input (`torch.Tensor` of shape `(tokens, in_features)`).
        block_index (`torch.Tensor` of shape `(nnzb,)`, `torch.int32`): flat ids of the wanted blocks.

    Returns:
        `torch.Tensor` of shape `(nnzb, rows, columns)`.
    """
    observer = _observers.get(block_index.data_ptr())
    if observer is not None:
        observer(grad, input)
    density = block_index.numel() * rows * columns / (grad.shape[1] * input.shape[1])
    backend = choose_backend(input.device, input.dtype, (rows, columns), density)
    return backend.sdd(grad, input, block_index, (grad.shape[1], input.shape[1]), (rows, columns))


# By the address of a layer's `block_index`: compiled code calls the operator with the buffer, not with the layer.
_observers: dict[int, Callable[[torch.Tensor, torch.Tensor], None]] = {}


def observe_sdd(block_index: torch.Tensor, observer: Callable[[torch.Tensor, torch.Tensor], None] | None) -> None:
    """
    Show `observer` the operands `(grad, input)` of every weight gradient of the layer with this `block_index`; `None`
    ends it. Works inside compiled and checkpointed models, where module hooks do not.
    """
    if observer is None:
        _observers.pop(block_index.data_ptr(), None)
    else:
        _observers[block_index.data_ptr()] = observer


@dds.register_fake
def _(input, values, block_index, bias, out_features, in_features, transposed):  # type: ignore[no-untyped-def]
    return input.new_empty(input.shape[0], in_features if transposed else out_features)


@sdd.register_fake
def _(grad, input, block_index, rows, columns):  # type: ignore[no-untyped-def]
    return input.new_empty(block_index.shape[0], rows, columns)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    input, values, block_index, bias, ctx.out_features, ctx.in_features, ctx.transposed = inputs
    ctx.save_for_backward(input, values, block_index)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    input, values, block_index = ctx.saved_tensors
    # The gradient may arrive expanded (from a sum) or strided; the products want rows.
    grad = grad.contiguous()
    grad_input = grad_values = grad_bias = None
    if ctx.needs_input_grad[0]:
        transposed = not ctx.transposed
        grad_input = dds(grad, values, block_index, None, ctx.out_features, ctx.in_features, transposed)
    if ctx.needs_input_grad[1]:
        left, right = (input, grad) if ctx.transposed else (grad, input)
        grad_values = sdd(left, right, block_index, values.shape[1], values.shape[2])
    if ctx.needs_input_grad[3]:
        grad_bias = grad.sum(0)
    return grad_input, grad_values, None, grad_bias, None, None, None


dds.register_autograd(_backward, setup_context=_setup_context)


def block_sparse_linear(
    input: torch.Tensor,
    values: torch.Tensor,
    block_index: torch.Tensor,
    bias: torch.Tensor | None,
    out_features: int,
) -> torch.Tensor:
    """
    `torch.nn.functional.linear` with a block-sparse weight; takes part in autocast as the dense one does.

    Args:
        input (`torch.Tensor` of shape `(..., in_features)`).
        values (`torch.Tensor` of shape `(nnzb, rows, columns)`): the active blocks.
        block_index (`torch.Tensor` of shape `(nnzb,)`, `torch.int32`): flat id `row * block_columns + column` of each.
        bias (`torch.Tensor` of shape `(out_features,)`, *optional*).

    Returns:
        `torch.Tensor` of shape `(..., out_features)`.

    Raises:
        ValueError: if `input` and `values` differ in dtype outside autocast.
    """
    if torch.is_autocast_enabled(input.device.type):
        dtype = torch.get_autocast_dtype(input.device.type)
        input, values = input.to(dtype), values.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    if input.dtype != values.dtype:
        raise ValueError(
            f"`input` and the layer's `values` must share a dtype. Got {input.dtype} and {values.dtype}. "
            "Convert one with `.to(...)`, or run under `torch.autocast`."
        )
    in_features = input.shape[-1]
    flat = input.reshape(-1, in_features).contiguous()  # [tokens, in_features]
    output = dds(flat, values, block_index, bias, out_features, in_features, False)
    return output.view(*input.shape[:-1], out_features)

"""
The derivatives of a block-sparse product: each is made of such products again, so all orders of them exist, in both
modes and under `torch.func`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from ..blocks.layout import layout_of
from .backends import BACKENDS, Gradients
from .operators import compute_linear, compute_linear_backward, linear, linear_backward
from .transforms import is_plain, is_transformed


Wanted = tuple[bool, bool, bool]  # gradients of input, values and bias


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
        ValueError: if sizes, dtypes or devices do not fit together, or a block id names no block, or one twice.
    """
    # The first question costs a tenth of the others.
    if torch._C._is_any_autocast_enabled() and not input.is_meta and torch.is_autocast_enabled(input.device.type):
        dtype = torch.get_autocast_dtype(input.device.type)
        input, values = input.to(dtype), values.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    flat = input
    if input.dim() != 2:
        if not input.dim() or not input.shape[-1]:
            raise ValueError(
                f"`input` must be of shape (..., in_features), with one feature at least. Got {tuple(input.shape)}. "
                "Reshape it."
            )
        flat = input.reshape(-1, input.shape[-1])  # [tokens, in_features]
    product: Callable[..., torch.Tensor] = _linear
    if not torch.compiler.is_dynamo_compiling() and is_plain(flat):
        product = _EagerLinear.apply if torch.is_grad_enabled() else compute_linear
    output = product(flat, values, block_index, bias, out_features)
    return output if flat is input else output.view(*input.shape[:-1], out_features)


def _linear(input: torch.Tensor, *others: Any) -> torch.Tensor:
    """`linear` under every transformation, compiled or not."""
    product = _Linear.apply if not torch.compiler.is_compiling() and is_transformed() else linear
    output: torch.Tensor = product(input, *others)
    return output


def _linear_backward(
    grad: torch.Tensor,
    input: torch.Tensor,
    values: torch.Tensor,
    block_index: torch.Tensor,
    wanted: Wanted,
) -> Gradients:
    """`linear_backward` by the shortest way; what is not wanted is `None`."""
    # The gradient may arrive expanded (from a sum) or strided; the products want rows.
    operands = grad.contiguous(), input, values, block_index, *wanted
    if torch.compiler.is_compiling():
        results: Sequence[torch.Tensor] = linear_backward(*operands)
    elif torch._C._functorch.is_legacy_batchedtensor(grad):  # several at once, by `is_grads_batched`
        # PyTorch's own products know what to do.
        _, rows, columns = values.shape
        layout = layout_of(block_index, (grad.shape[1], input.shape[1]), (rows, columns))
        return BACKENDS["reference"].backward(grad, input, values, layout, wanted)
    elif torch.is_grad_enabled() or is_transformed():
        results = _LinearBackward.apply(*operands)
    else:
        results = (compute_linear_backward if is_plain(grad) else linear_backward)(*operands)
    rest = iter(results)
    of_input, of_values, of_bias = (next(rest) if want else None for want in wanted)
    return of_input, of_values, of_bias


class _EagerLinear(torch.autograd.Function):
    """`linear` where nothing but gradients is asked for: about half of the operator's overhead."""

    @staticmethod
    def forward(ctx, input, values, block_index, bias, out_features):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(input, values, block_index)
        return compute_linear(input, values, block_index, bias, out_features)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return _differentiate(ctx, grad)


class _Linear(torch.autograd.Function):
    """`linear` under every transformation."""

    @staticmethod
    def forward(input, values, block_index, bias, out_features):  # type: ignore[no-untyped-def]
        return linear(input, values, block_index, bias, out_features)

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        _save(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:3])

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return _differentiate(ctx, grad)

    @staticmethod
    def jvp(ctx, input_tangent, values_tangent, _, bias_tangent, __):  # type: ignore[no-untyped-def]
        input, values, block_index = ctx.saved_tensors
        out_features = ctx.out_features
        return _sum(
            None if input_tangent is None else _linear(input_tangent, values, block_index, None, out_features),
            None if values_tangent is None else _linear(input, values_tangent, block_index, None, out_features),
            None if bias_tangent is None else bias_tangent.expand(input.shape[0], out_features),
        )

    @staticmethod
    def vmap(info, in_dims, *operands):  # type: ignore[no-untyped-def]
        return _map_linear(_linear, info, in_dims, *operands)


class _LinearBackward(torch.autograd.Function):
    """`linear_backward` under every transformation."""

    @staticmethod
    def forward(*operands):  # type: ignore[no-untyped-def]
        return tuple(linear_backward(*operands))

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        _save_backward(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:4])

    @staticmethod
    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        return _differentiate_backward(ctx, grads)

    @staticmethod
    def jvp(ctx, grad_tangent, input_tangent, values_tangent, *_):  # type: ignore[no-untyped-def]
        grad, input, values, block_index = ctx.saved_tensors
        # `grad @ W`, the blocks of `grad.T @ input` and the sum of `grad`: linear in `grad`, and in the other factor.
        given = (grad_tangent, grad), (input_tangent, input), (values_tangent, values)
        tangents = [torch.zeros_like(primal) if tangent is None else tangent for tangent, primal in given]
        by_grad = _linear_backward(tangents[0], input, values, block_index, ctx.wanted)
        by_other = _linear_backward(grad, tangents[1], tangents[2], block_index, (*ctx.wanted[:2], False))
        pairs = zip(by_grad, by_other, ctx.wanted, strict=True)
        return tuple(_sum(one, other) for one, other, want in pairs if want)

    @staticmethod
    def vmap(info, in_dims, *operands):  # type: ignore[no-untyped-def]
        return _map(_LinearBackward.apply, info, in_dims, *operands)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    input, values, block_index, _, ctx.out_features = inputs
    ctx.save_for_backward(input, values, block_index)


def _differentiate(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    input, values, block_index = ctx.saved_tensors
    wanted = ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3]
    of_input, of_values, of_bias = _linear_backward(grad, input, values, block_index, wanted)
    return of_input, of_values, None, of_bias, None


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    grad, input, values, block_index, *wanted = inputs
    ctx.save_for_backward(grad, input, values, block_index)
    ctx.set_materialize_grads(False)
    ctx.wanted = tuple(wanted)


def _differentiate_backward(ctx: Any, grads: Sequence[torch.Tensor | None]) -> tuple[torch.Tensor | None, ...]:
    """The gradients of what is linear in `grad` and in the other factor: `grad @ W` and `grad.T @ input`."""
    grad, input, values, block_index = ctx.saved_tensors
    rest, out_features = iter(grads), grad.shape[1]
    by_input, by_values, by_bias = (next(rest) if want else None for want in ctx.wanted)
    of_grad, of_input, of_values = None, None, None
    if ctx.needs_input_grad[0]:
        of_grad = _sum(
            None if by_input is None else _linear(by_input, values, block_index, None, out_features),
            None if by_values is None else _linear(input, by_values, block_index, None, out_features),
            None if by_bias is None else by_bias.expand_as(grad),
        )
    if ctx.needs_input_grad[1] and by_values is not None:
        of_input, _, _ = _linear_backward(grad, input, by_values, block_index, (True, False, False))
    if ctx.needs_input_grad[2] and by_input is not None:
        _, of_values, _ = _linear_backward(grad, by_input, values, block_index, (False, True, False))
    return of_grad, of_input, of_values, None, None, None, None


def _map_linear(product: Callable[..., torch.Tensor], info: Any, in_dims: Any, *operands: Any) -> tuple[Any, Any]:
    """`torch.vmap` of `product`, which is `linear`."""
    input, values, block_index, bias, out_features = operands
    if any(dim is not None for dim in in_dims[1:]):
        return _map(product, info, in_dims, *operands)
    several = input.movedim(in_dims[0], 0)  # no more than more tokens
    output = product(several.flatten(0, 1), values, block_index, bias, out_features)
    return output.unflatten(0, several.shape[:2]), 0


def _map(product: Callable[..., Any], info: Any, in_dims: Any, *operands: Any) -> tuple[Any, Any]:
    """`torch.vmap` of a product, one after the other."""
    results = [
        product(*(one if dim is None else one.select(dim, place) for one, dim in zip(operands, in_dims, strict=True)))
        for place in range(info.batch_size)
    ]
    if isinstance(results[0], torch.Tensor):
        return torch.stack(results), 0
    stacked = [torch.stack(several) for several in zip(*results, strict=True)]
    return type(results[0])(stacked), type(results[0])([0] * len(stacked))


def _sum(*terms: torch.Tensor | None) -> torch.Tensor | None:
    present = [term for term in terms if term is not None]
    return sum(present[1:], present[0]) if present else None


linear.register_autograd(_differentiate, setup_context=_save)
linear.register_vmap(partial(_map_linear, linear))
linear_backward.register_autograd(_differentiate_backward, setup_context=_save_backward)
linear_backward.register_vmap(partial(_map, linear_backward))

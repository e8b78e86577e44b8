"""
A block-sparse linear layer as PyTorch operators, with gradients and autocast: opaque to `torch.compile`, so that a
topology update changes no traced shape and causes no recompilation.
"""

from collections.abc import Callable

import torch

from .backends import Problem
from .choice import choose_backend


Observer = Callable[[torch.Tensor, torch.Tensor], None]


def _linear(
    input: torch.Tensor,
    values: torch.Tensor,
    block_index: torch.Tensor,
    bias: torch.Tensor | None,
    out_features: int,
) -> torch.Tensor:
    """
    `input @ W.T + bias`.

    Args:
        input (`torch.Tensor` of shape `(tokens, in_features)`).
        values (`torch.Tensor` of shape `(nnzb, rows, columns)`): the active blocks of `W`, of the dtype of `input`.
        block_index (`torch.Tensor` of shape `(nnzb,)`, `torch.int32`): their flat ids.
        bias (`torch.Tensor` of shape `(out_features,)`, *optional*).

    Returns:
        `torch.Tensor` of shape `(tokens, out_features)`.
    """
    shape = out_features, input.shape[1]
    backend = choose_backend(Problem.of(input, values, shape, backward=False))
    return backend.dds(input, values, block_index, bias, shape, False)


def _linear_backward(
    grad: torch.Tensor,
    input: torch.Tensor,
    values: torch.Tensor,
    block_index: torch.Tensor,
    of_input: bool,
    of_values: bool,
    of_bias: bool,
) -> list[torch.Tensor]:
    """
    The gradients of `linear` that are asked for, in the order input, values, bias.

    Args:
        grad (`torch.Tensor` of shape `(tokens, out_features)`): gradient of the output.
        input, values, block_index: the arguments of `linear`.

    Returns:
        `list[torch.Tensor]` of the shapes of what they are gradients of.
    """
    if of_values:
        observer = _observers.get(block_index.data_ptr())
        if observer is not None:
            observer(grad, input)
    shape = grad.shape[1], input.shape[1]
    backend = choose_backend(Problem.of(grad, values, shape, backward=True))
    results = backend.backward(grad, input, values, block_index, shape, (of_input, of_values, of_bias))
    return [result for result in results if result is not None]


linear = torch.library.custom_op("hf_dynsparse::linear", _linear, mutates_args=())
linear_backward = torch.library.custom_op("hf_dynsparse::linear_backward", _linear_backward, mutates_args=())

# By the address of a layer's `block_index`: compiled code calls the operator with the buffer, not with the layer.
_observers: dict[int, Observer] = {}


def observe_weight_gradient(block_index: torch.Tensor, observer: Observer) -> Callable[[], None]:
    """
    Show `observer` the operands `(grad, input)` of every weight gradient of the layer with this `block_index`, until
    what is returned is called. Works inside compiled and checkpointed models, where module hooks do not.
    """

    def end() -> None:  # keeps the index, so that nobody else comes to its address meanwhile
        if _observers.get(block_index.data_ptr()) is observer:
            del _observers[block_index.data_ptr()]

    _observers[block_index.data_ptr()] = observer
    return end


@linear.register_fake
def _(input, values, block_index, bias, out_features):  # type: ignore[no-untyped-def]
    return input.new_empty(input.shape[0], out_features)


@linear_backward.register_fake
def _(grad, input, values, block_index, of_input, of_values, of_bias):  # type: ignore[no-untyped-def]
    shapes = (of_input, input.shape), (of_values, values.shape), (of_bias, grad.shape[1:])
    return [grad.new_empty(shape) for wanted, shape in shapes if wanted]


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    input, values, block_index, _, _ = inputs
    ctx.save_for_backward(input, values, block_index)


def _backward(ctx, grad, backward=linear_backward):  # type: ignore[no-untyped-def]
    input, values, block_index = ctx.saved_tensors
    # The gradient may arrive expanded (from a sum) or strided; the products want rows.
    grad = grad.contiguous()
    wanted = ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3]
    results = iter(backward(grad, input, values, block_index, *wanted))
    of_input, of_values, of_bias = (next(results) if want else None for want in wanted)
    return of_input, of_values, None, of_bias, None


linear.register_autograd(_backward, setup_context=_setup_context)


class _EagerLinear(torch.autograd.Function):
    """`linear` where nothing is traced: about half of the operator's overhead, which is more than a small product."""

    @staticmethod
    def forward(ctx, input, values, block_index, bias, out_features):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(input, values, block_index)
        return _linear(input, values, block_index, bias, out_features)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return _backward(ctx, grad, _linear_backward)


def _apply_linear(
    input: torch.Tensor,
    values: torch.Tensor,
    block_index: torch.Tensor,
    bias: torch.Tensor | None,
    out_features: int,
) -> torch.Tensor:
    # Fake tensors, which tracing works with, are of another type.
    if torch.compiler.is_compiling() or type(input) is not torch.Tensor:
        return linear(input, values, block_index, bias, out_features)
    if torch.is_grad_enabled():
        return _EagerLinear.apply(input, values, block_index, bias, out_features)
    return _linear(input, values, block_index, bias, out_features)


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
    output = _apply_linear(flat, values, block_index, bias, out_features)
    return output.view(*input.shape[:-1], out_features)

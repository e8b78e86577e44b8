"""
The products of a block-sparse linear layer as PyTorch operators: opaque to `torch.compile`, so that a topology update
changes no traced shape and causes no recompilation. Their derivatives are in `autograd.py`.
"""

from collections.abc import Callable

import torch

from .checks import check_linear, check_linear_backward, check_linear_backward_sizes, check_linear_sizes
from .choice import choose_backend
from .transforms import refuse_tangents


# Who differentiates in forward mode.
LAYER = "a layer, or `block_sparse_linear`"

Observer = Callable[[torch.Tensor, torch.Tensor], None]


def compute_linear(
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
    problem = check_linear(input, values, block_index, bias, out_features)
    if input.is_meta:
        return input.new_empty(input.shape[0], out_features)
    return choose_backend(problem).dds(input, values, block_index, bias, problem.shape, False)


def compute_linear_backward(
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
    problem = check_linear_backward(grad, input, values, block_index)
    wanted = of_input, of_values, of_bias
    if input.is_meta:
        return _empty_gradients(grad, input, values, wanted)
    if of_values:
        observer = _observers.get(block_index.data_ptr())
        if observer is not None:
            observer(grad, input)
    results = choose_backend(problem).backward(grad, input, values, block_index, problem.shape, wanted)
    return [result for result in results if result is not None]


def _empty_gradients(
    grad: torch.Tensor, input: torch.Tensor, values: torch.Tensor, wanted: tuple[bool, bool, bool]
) -> list[torch.Tensor]:
    shapes = input.shape, values.shape, grad.shape[1:]
    return [grad.new_empty(shape) for shape, want in zip(shapes, wanted, strict=True) if want]


@torch.library.custom_op("hf_dynsparse::linear", mutates_args=())
def linear(
    input: torch.Tensor,
    values: torch.Tensor,
    block_index: torch.Tensor,
    bias: torch.Tensor | None,
    out_features: int,
) -> torch.Tensor:
    """`compute_linear` for those who record operators."""
    refuse_tangents(LAYER)
    return compute_linear(input, values, block_index, bias, out_features)


@torch.library.custom_op("hf_dynsparse::linear_backward", mutates_args=())
def linear_backward(
    grad: torch.Tensor,
    input: torch.Tensor,
    values: torch.Tensor,
    block_index: torch.Tensor,
    of_input: bool,
    of_values: bool,
    of_bias: bool,
) -> list[torch.Tensor]:
    """`compute_linear_backward` for those who record operators."""
    refuse_tangents(LAYER)
    return compute_linear_backward(grad, input, values, block_index, of_input, of_values, of_bias)


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
    refuse_tangents(LAYER)
    check_linear_sizes(input, values, block_index, bias, out_features)
    return input.new_empty(input.shape[0], out_features)


@linear_backward.register_fake
def _(grad, input, values, block_index, of_input, of_values, of_bias):  # type: ignore[no-untyped-def]
    refuse_tangents(LAYER)
    check_linear_backward_sizes(grad, input, values, block_index)
    return _empty_gradients(grad, input, values, (of_input, of_values, of_bias))

"""
The products of a block-sparse linear layer as PyTorch operators: opaque to `torch.compile`, so that a topology update
changes no traced shape and causes no recompilation. Their derivatives are in `autograd.py`.

`compute_linear` and `compute_linear_backward` do the work. Where nothing but a result is asked for they are called
directly, since an operator costs more than a small product.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from ..blocks.layout import layouts_of
from . import choice
from .checks import (
    check_block_index,
    check_index_sizes,
    check_integer,
    check_linear,
    check_linear_backward,
    facts_of,
    find_weight,
)
from .choice import Served
from .problem import Problem
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
    """[`block_sparse_linear`] of `input` of shape `(tokens, in_features)`, without autocast and gradients."""
    # All that the rules look at, flat: a tuple in the tuple costs as much as two entries.
    key: Any = (
        input.shape,
        input.dtype,
        input.is_cpu or input.device,
        values.shape,
        values.dtype,
        values.is_cpu or values.device,
        out_features,
        torch.get_num_threads(),
        choice.requested,
    )
    if bias is not None:
        key = key, bias.shape, bias.dtype, bias.is_cpu or bias.device
    backend, weight = choice.plan.served.get(key) or _serve_linear(key, input, values, bias, out_features)
    layout = layouts_of(block_index).get(weight) or check_block_index(block_index, weight)
    if backend is None:
        return input.new_empty(input.shape[0], out_features)
    return backend.dds(input, values, layout, bias, False)


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
    The gradients of `compute_linear` that are asked for, in the order input, values, bias, from that of its output,
    `grad` of shape `(tokens, out_features)`. Each has the shape of what it is the gradient of.

    Raises:
        ValueError: as [`block_sparse_linear`].
    """
    key = (
        grad.shape,
        grad.dtype,
        grad.is_cpu or grad.device,
        input.shape,
        input.dtype,
        input.is_cpu or input.device,
        values.shape,
        values.dtype,
        values.is_cpu or values.device,
        torch.get_num_threads(),
        choice.requested,
    )
    backend, weight = choice.plan.served.get(key) or _serve_linear_backward(key, grad, input, values)
    layout = layouts_of(block_index).get(weight) or check_block_index(block_index, weight)
    wanted = of_input, of_values, of_bias
    if backend is None:
        return _empty_gradients(grad, input, values, wanted)
    if of_values and _observers and (observer := _observers.get(block_index)) is not None:
        observer(grad, input)
    return [result for result in backend.backward(grad, input, values, layout, wanted) if result is not None]


def _serve_linear(
    key: Any, input: torch.Tensor, values: torch.Tensor, bias: torch.Tensor | None, out_features: int
) -> Served:
    """Compare the operands of `compute_linear`, choose a backend for them, and remember it under `key`."""
    out_features = check_integer(out_features)
    check_linear(facts_of(input), facts_of(values), None if bias is None else facts_of(bias), out_features)
    return _serve(key, input, values, out_features, backward=False)


def _serve_linear_backward(key: Any, grad: torch.Tensor, input: torch.Tensor, values: torch.Tensor) -> Served:
    """The same for `compute_linear_backward`."""
    check_linear_backward(facts_of(grad), facts_of(input), facts_of(values))
    return _serve(key, input, values, grad.shape[1], backward=True)


def _serve(key: Any, input: torch.Tensor, values: torch.Tensor, out_features: int, *, backward: bool) -> Served:
    (tokens, in_features), (nnzb, rows, columns) = input.shape, values.shape
    shape, block_shape = (out_features, in_features), (rows, columns)
    problem = Problem.make(input.device, input.dtype, block_shape, shape, nnzb, tokens, backward)
    return choice.plan.serve(key, problem, find_weight(shape, block_shape, nnzb, input.device))


def _empty_gradients(
    grad: torch.Tensor, input: torch.Tensor, values: torch.Tensor, wanted: tuple[bool, bool, bool]
) -> list[torch.Tensor]:
    shapes = input.shape, values.shape, grad.shape[1:]
    return [grad.new_empty(shape) for shape, want in zip(shapes, wanted, strict=True) if want]


def _operator(name: str, compute: Callable[..., Any]) -> Any:
    """`compute` as a PyTorch operator, which tracers and compilers see as one node."""

    @wraps(compute)
    def run(*operands: Any) -> Any:
        refuse_tangents(LAYER)
        return compute(*operands)

    return torch.library.custom_op(f"hf_dynsparse::{name}", run, mutates_args=())


linear = _operator("linear", compute_linear)
linear_backward = _operator("linear_backward", compute_linear_backward)


@linear.register_fake
def _(input, values, block_index, bias, out_features):  # type: ignore[no-untyped-def]
    refuse_tangents(LAYER)
    check_linear(facts_of(input), facts_of(values), None if bias is None else facts_of(bias), out_features)
    check_index_sizes(block_index, values.shape[0], input.device)
    return input.new_empty(input.shape[0], out_features)


@linear_backward.register_fake
def _(grad, input, values, block_index, of_input, of_values, of_bias):  # type: ignore[no-untyped-def]
    refuse_tangents(LAYER)
    check_linear_backward(facts_of(grad), facts_of(input), facts_of(values))
    check_index_sizes(block_index, values.shape[0], input.device)
    return _empty_gradients(grad, input, values, (of_input, of_values, of_bias))


# Compiled code calls the operator with the buffer of a layer, not with the layer.
_observers: WeakIdKeyDictionary = WeakIdKeyDictionary()


def observe_weight_gradient(block_index: torch.Tensor, observer: Observer) -> Callable[[], None]:
    """
    Show `observer` the operands `(grad, input)` of every weight gradient of the layer with this `block_index`, until
    what is returned is called. Works inside compiled and checkpointed models, where module hooks do not.
    """

    def end() -> None:
        if _observers.get(block_index) is observer:
            del _observers[block_index]

    _observers[block_index] = observer
    return end

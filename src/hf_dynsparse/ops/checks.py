"""
What a product may be given. All sizes, dtypes, devices and block ids are compared here, at the operator, so that no
backend reads or writes beyond its operands, in eager, compiled and exported form.

A product of one token takes microseconds: the verdict about sizes is remembered by them, that about block ids by the
tensor that holds them.
"""

from dataclasses import dataclass
from functools import lru_cache
from operator import index as as_integer
from typing import Any

import torch

from ..blocks.sizes import block_grid
from .orders import check_once, check_topology
from .problem import Problem
from .reference import Shape


__all__ = ["check_linear", "check_linear_backward", "check_linear_backward_sizes", "check_linear_sizes"]

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# What the rules look at of a tensor. `True` stands for the processor: it is read faster than a device.
Facts = tuple[torch.Size, torch.dtype, torch.device | bool]

MOST_BLOCKS = 2**31 - 1

# Sizes that are remembered; each number of tokens counts.
REMEMBERED = 4096


def check_linear(
    input: torch.Tensor,
    values: torch.Tensor,
    block_index: torch.Tensor,
    bias: torch.Tensor | None,
    out_features: int,
) -> Problem:
    """
    The problem that `linear` is asked to solve.

    Raises:
        ValueError: if the operands do not fit together, or `block_index` is not that of a matrix of this size.
    """
    of_bias = None if bias is None else (bias.shape, bias.dtype, bias.is_cpu or bias.device)
    problem, weight = _linear_problem(
        (input.shape, input.dtype, input.is_cpu or input.device),
        (values.shape, values.dtype, values.is_cpu or values.device),
        of_bias,
        out_features,
        torch.get_num_threads(),
    )
    check_once(_check_block_index, block_index, weight)
    return problem


def check_linear_backward(
    grad: torch.Tensor, input: torch.Tensor, values: torch.Tensor, block_index: torch.Tensor
) -> Problem:
    """
    The problem that `linear_backward` is asked to solve.

    Raises:
        ValueError: as `check_linear`.
    """
    problem, weight = _linear_backward_problem(
        (grad.shape, grad.dtype, grad.is_cpu or grad.device),
        (input.shape, input.dtype, input.is_cpu or input.device),
        (values.shape, values.dtype, values.is_cpu or values.device),
        torch.get_num_threads(),
    )
    check_once(_check_block_index, block_index, weight)
    return problem


def check_linear_sizes(
    input: torch.Tensor,
    values: torch.Tensor,
    block_index: torch.Tensor,
    bias: torch.Tensor | None,
    out_features: int,
) -> None:
    """What `check_linear` can see of tensors without contents."""
    _check_operands(_facts(input), _facts(values), out_features)
    if bias is not None:
        _check_bias(_facts(input), _facts(bias), out_features)
    _check_index_sizes(block_index, values.shape[0], input.device)


def check_linear_backward_sizes(
    grad: torch.Tensor, input: torch.Tensor, values: torch.Tensor, block_index: torch.Tensor
) -> None:
    """What `check_linear_backward` can see of tensors without contents."""
    _check_grad(_facts(grad), _facts(input))
    _check_operands(_facts(input), _facts(values), grad.shape[1])
    _check_index_sizes(block_index, values.shape[0], input.device)


@lru_cache(REMEMBERED)
def _linear_problem(input: Facts, values: Facts, bias: Facts | None, out_features: int, threads: int) -> "_Known":
    try:
        out_features = int(as_integer(out_features))
    except TypeError:
        raise ValueError(f"`out_features` must be an integer. Got {out_features!r}. Give that of the layer.") from None
    _check_operands(input, values, out_features)
    if bias is not None:
        _check_bias(input, bias, out_features)
    return _known(input, values, out_features, backward=False)


@lru_cache(REMEMBERED)
def _linear_backward_problem(grad: Facts, input: Facts, values: Facts, threads: int) -> "_Known":
    _check_grad(grad, input)
    _check_operands(input, values, grad[0][1])
    return _known(input, values, grad[0][1], backward=True)


def _known(input: Facts, values: Facts, out_features: int, *, backward: bool) -> "_Known":
    ((tokens, in_features), dtype, place), ((nnzb, rows, columns), _, _) = input, values
    device = _device(place)
    shape, block_shape = (out_features, in_features), (rows, columns)
    problem = Problem.make(device, dtype, block_shape, shape, nnzb, tokens, backward)
    return problem, _weight(shape, block_shape, nnzb, device)


@lru_cache(REMEMBERED)
def _weight(shape: Shape, block_shape: Shape, nnzb: int, device: torch.device) -> "_Weight":
    return _Weight(shape, block_shape, nnzb, device)


@dataclass(frozen=True, eq=False)  # one object for each: found by its identity, which costs least
class _Weight:
    """What a `block_index` must fit."""

    shape: Shape
    block_shape: Shape
    nnzb: int
    device: torch.device


_Known = tuple[Problem, _Weight]


def _facts(tensor: torch.Tensor) -> Facts:
    return tensor.shape, tensor.dtype, tensor.is_cpu or tensor.device


def _device(place: torch.device | bool) -> torch.device:
    return place if isinstance(place, torch.device) else torch.device("cpu")


def _check_operands(input: Facts, values: Facts, out_features: int) -> None:
    (shape, dtype, _), (blocks, _, _) = input, values
    if dtype not in DTYPES:
        names = ", ".join(str(allowed).removeprefix("torch.") for allowed in DTYPES)
        raise ValueError(f"`input` must be of dtype {names}. Got {dtype}. Convert it and the layer with `.to(...)`.")
    _check_alike(input, values, "the layer's `values`")
    if len(shape) != 2:
        raise ValueError(f"`input` must be of shape (tokens, in_features). Got {_sizes(shape)}. Reshape it.")
    if len(blocks) != 3 or min(blocks) < 1:
        raise ValueError(
            f"`values` must be of shape (nnzb, rows, columns), all at least 1. Got {_sizes(blocks)}. Give the active "
            "blocks of the layer as it stores them."
        )
    if min(out_features, shape[1]) < 1:
        raise ValueError(
            f"`out_features` and the last side of `input` must be at least 1. Got {out_features} and {shape[1]}. Give "
            "those of the layer."
        )
    grid = block_grid((out_features, shape[1]), blocks[1:], "the layer")
    if grid[0] * grid[1] > MOST_BLOCKS:
        raise ValueError(
            f"A layer must have at most {MOST_BLOCKS} blocks, active or not: their ids are int32. Got "
            f"{grid[0]} x {grid[1]}. Choose larger blocks."
        )


def _check_bias(input: Facts, bias: Facts, out_features: int) -> None:
    _check_alike(input, bias, "the layer's `bias`")
    if tuple(bias[0]) != (out_features,):
        raise ValueError(
            f"`bias` must be of shape ({out_features},), one number for each output. Got {_sizes(bias[0])}. Give that "
            "of the layer, or none."
        )


def _check_grad(grad: Facts, input: Facts) -> None:
    _check_alike(input, grad, "`grad`")
    if len(grad[0]) != 2 or grad[0][:1] != input[0][:1]:
        raise ValueError(
            f"`grad` must be of shape (tokens, out_features) with the tokens of `input`. Got {_sizes(grad[0])} for an "
            f"input of {_sizes(input[0])}. Give the gradient of the output for this very input."
        )


def _check_alike(input: Facts, other: Facts, name: str) -> None:
    (_, dtype, place), (_, other_dtype, other_place) = input, other
    if other_dtype != dtype:
        raise ValueError(
            f"`input` and {name} must share a dtype. Got {dtype} and {other_dtype}. "
            "Convert one with `.to(...)`, or run under `torch.autocast`."
        )
    if other_place != place:
        raise ValueError(
            f"`input` and {name} must be on one device. Got {_device(place)} and {_device(other_place)}. Move one "
            "with `.to(...)`."
        )


def _check_block_index(block_index: torch.Tensor, weight: _Weight) -> None:
    _check_index_sizes(block_index, weight.nnzb, weight.device)
    if block_index.is_cuda and torch.cuda.is_current_stream_capturing():
        return  # nobody may wait for the GPU now; a kernel that is captured has run before, and was checked then
    if not block_index.is_meta:
        check_topology(block_index, weight.shape, weight.block_shape)


def _check_index_sizes(block_index: torch.Tensor, nnzb: int, device: torch.device) -> None:
    if block_index.dtype != torch.int32 or block_index.dim() != 1:
        raise ValueError(
            f"`block_index` must be a 1-D int32 tensor. Got {block_index.dtype} of shape {_sizes(block_index.shape)}. "
            "Convert it with `.flatten().int()`."
        )
    if block_index.shape[0] != nnzb:
        raise ValueError(
            f"`block_index` must name one block for each of the `values`. Got {block_index.shape[0]} ids for {nnzb} "
            "blocks. Change both together."
        )
    if block_index.device != device:
        raise ValueError(
            f"`input` and the layer's `block_index` must be on one device. Got {device} and {block_index.device}. "
            "Move one with `.to(...)`."
        )


def _sizes(shape: Any) -> str:
    return str(tuple(shape))

"""
What a product may be given. All sizes, dtypes, devices and block ids are compared here, at the operator, so that no
backend reads or writes beyond its operands, in eager, compiled and exported form.

A product of one token takes microseconds, so nothing is compared twice: what is right is remembered, sizes beside the
backend that serves them (`ops/choice.py`), block ids beside the tensor that holds them (`blocks/layout.py`).
"""

from dataclasses import dataclass
from functools import lru_cache
from operator import index as as_integer
from typing import Any

import torch

from ..blocks.layout import BlockLayout, layout_of, layouts_of
from ..blocks.sizes import block_grid
from .reference import Shape


DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# What the rules look at of a tensor. `True` means the CPU: it is read faster than a device.
Facts = tuple[torch.Size, torch.dtype, torch.device | bool]

MOST_BLOCKS = 2**31 - 1


@dataclass(frozen=True, eq=False)  # one object for each: found by its identity, which costs least
class Weight:
    """What a `block_index` must fit: `(out_features, in_features)`, sides of a block, active blocks, device."""

    shape: Shape
    block_shape: Shape
    nnzb: int
    device: torch.device


find_weight = lru_cache(4096)(Weight)


def facts_of(tensor: torch.Tensor) -> Facts:
    """What the rules look at."""
    return tensor.shape, tensor.dtype, tensor.is_cpu or tensor.device


def device_of(facts: Facts) -> torch.device:
    """Where the tensor is."""
    return facts[2] if isinstance(facts[2], torch.device) else torch.device("cpu")


def check_integer(out_features: int) -> int:
    """
    `out_features` as an `int`.

    Raises:
        ValueError: if it is none.
    """
    try:
        return int(as_integer(out_features))
    except TypeError:
        raise ValueError(f"`out_features` must be an integer. Got {out_features!r}. Give that of the layer.") from None


def check_linear(input: Facts, values: Facts, bias: Facts | None, out_features: int) -> None:
    """
    Check the operands of `linear`, all but `block_index`.

    Raises:
        ValueError: if they do not fit together.
    """
    _check_operands(input, values, out_features)
    if bias is not None:
        _check_bias(input, bias, out_features)


def check_linear_backward(grad: Facts, input: Facts, values: Facts) -> None:
    """
    Check the operands of `linear_backward`, all but `block_index`.

    Raises:
        ValueError: if they do not fit together.
    """
    _check_grad(grad, input)
    _check_operands(input, values, grad[0][1])


def check_block_index(block_index: torch.Tensor, weight: Weight) -> BlockLayout:
    """
    The layout of `block_index` for a product with `weight`; found in `layouts_of(block_index)` from now on.

    Raises:
        ValueError: if it does not fit, or names a block that the matrix does not have, or one twice.
    """
    check_index_sizes(block_index, weight.nnzb, weight.device)
    layout = layout_of(block_index, weight.shape, weight.block_shape)
    # A capture must not wait for the GPU; its kernels have run before, and the ids were checked then.
    if not block_index.is_meta and not (block_index.is_cuda and torch.cuda.is_current_stream_capturing()):
        layout.validate()
    layouts_of(block_index)[weight] = layout
    return layout


def check_index_sizes(block_index: torch.Tensor, nnzb: int, device: torch.device) -> None:
    """
    Check what can be seen of a `block_index` without its contents.

    Raises:
        ValueError: if it does not fit `nnzb` blocks on `device`.
    """
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
            f"`input` and {name} must be on one device. Got {device_of(input)} and {device_of(other)}. Move one "
            "with `.to(...)`."
        )


def _sizes(shape: Any) -> str:
    return str(tuple(shape))

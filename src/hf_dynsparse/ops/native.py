"""
The backend of the processor: the kernels of `csrc/`, compiled once per instruction set and called through ctypes.

The library shares PyTorch's OpenMP threads and obeys `torch.set_num_threads`. Bit-reproducible for a given number of
threads.
"""

import ctypes
import weakref
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch

from ..layout import BlockLayout
from .reference import Shape


__all__ = ["break_even", "dds", "sdd", "why_not"]

# What csrc/block_sparse.cpp instantiates.
BLOCK_SHAPES = ((1, 1), (1, 4), (4, 4), (8, 8), (16, 16), (32, 32), (64, 64))

# What `best_variant` of the portable library answers -> the library for that processor.
VARIANTS = {4: "x86_64_v4", 3: "x86_64_v3", 0: "portable"}

INTERFACE_VERSION = 1

_BUILD = "Build it with a C++ compiler: pip install -e . (or python setup.py build_ext --inplace)"


class LibraryUnavailable(Exception):
    """The compiled library of a variant cannot be used; the message says why."""


@cache
def load_variant(variant: str) -> ctypes.CDLL:
    """
    Load the compiled kernels for one instruction set.

    Raises:
        LibraryUnavailable: if it is not built, does not load or comes from other sources.
    """
    path = Path(__file__).with_name(f"_native_{variant}.so")
    if not path.is_file():
        raise LibraryUnavailable(f"{path.name} is not built. {_BUILD}")
    try:
        # torch is loaded by now, so its libgomp.so.1, and with it its threads, are the ones the library gets.
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise LibraryUnavailable(f"{path.name} does not load ({error}). {_BUILD}") from error
    found = library.interface_version()
    if found != INTERFACE_VERSION:
        raise LibraryUnavailable(f"{path.name} must have interface {INTERFACE_VERSION}. Got {found}. {_BUILD}")
    number, size, address = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
    library.dds.argtypes = [number] * 4 + [size] * 3 + [address] * 7
    library.sdd.argtypes = [number] * 4 + [size] * 3 + [address] * 2 + [size] + [address] * 4
    return library


@cache
def _library() -> ctypes.CDLL | str:
    """The library for this processor, or why there is none."""
    try:
        return load_variant(VARIANTS[load_variant("portable").best_variant()])
    except LibraryUnavailable as reason:
        return str(reason)


def why_not(device: torch.device, dtype: torch.dtype, block_shape: Shape) -> str | None:
    """Why these operands cannot be served, or `None` if they can."""
    if device.type != "cpu":
        return "runs on the processor"
    if dtype != torch.float32:
        return "needs float32"
    if block_shape not in BLOCK_SHAPES:
        return f"needs blocks of {', '.join(f'{rows} x {columns}' for rows, columns in BLOCK_SHAPES)}"
    library = _library()
    return library if isinstance(library, str) else None


def break_even(block_shape: Shape) -> float:
    """
    Density above which the dense product is faster: measured at 256 x 256 and 768 x 768, 4,096 tokens, on
    an AVX-512 processor.
    """
    return 0.6 if block_shape[0] > 1 else 0.25


def dds(
    input: torch.Tensor,
    values: torch.Tensor,
    block_index: torch.Tensor,
    bias: torch.Tensor | None,
    shape: Shape,
    transposed: bool,
) -> torch.Tensor:
    """
    `input @ W.T + bias`, or `input @ W` if `transposed` (the input gradient); see `hf_dynsparse.ops.operators.dds`.
    """
    rows, columns = values.shape[1:]
    walk = _walk(block_index, shape, (rows, columns), by_column=transposed)
    # Named, so that copies live until the call has returned.
    input, values = input.contiguous(), values.contiguous()
    bias = None if bias is None else bias.contiguous()
    output = input.new_empty(input.shape[0], shape[1] if transposed else shape[0])
    _call(
        "dds",
        (rows, columns),
        *(transposed, torch.get_num_threads(), input.shape[0], *shape, input.data_ptr()),
        *(walk.offsets.data_ptr(), (walk.rows if transposed else walk.columns).data_ptr(), walk.slots.data_ptr()),
        *(values.data_ptr(), None if bias is None else bias.data_ptr(), output.data_ptr()),
    )
    return output


def sdd(
    grad: torch.Tensor, input: torch.Tensor, block_index: torch.Tensor, shape: Shape, block_shape: Shape
) -> torch.Tensor:
    """The active blocks of `grad.T @ input`; see `hf_dynsparse.ops.operators.sdd`."""
    # The operand that is read again for each line of the other should be the smaller one.
    by_column = shape[1] > shape[0] and block_shape[0] == block_shape[1]
    walk = _walk(block_index, shape, block_shape, by_column)
    grad, input = grad.contiguous(), input.contiguous()
    output = input.new_empty(block_index.numel(), *block_shape)
    _call(
        "sdd",
        block_shape,
        *(by_column, torch.get_num_threads(), input.shape[0], *shape, grad.data_ptr(), input.data_ptr()),
        *(walk.slots.numel(), walk.rows.data_ptr(), walk.columns.data_ptr(), walk.slots.data_ptr()),
        output.data_ptr(),
    )
    return output


def _call(product: str, block_shape: Shape, *arguments: int | None) -> None:
    library = _library()
    if isinstance(library, str):
        raise RuntimeError(f"The native backend cannot run: {library}.")
    if getattr(library, product)(*block_shape, *arguments):
        raise RuntimeError(f"The native backend has no {product} for {block_shape[0]} x {block_shape[1]} blocks.")


@dataclass(frozen=True)
class Walk:
    """
    The active blocks sorted by row, or by column, in the integers of the library: all `torch.int32`.

    Args:
        offsets (`torch.Tensor` of shape `(block_rows + 1,)` or `(block_columns + 1,)`): start of each row or column.
        rows, columns (`torch.Tensor` of shape `(nnzb,)`): block row and block column of each.
        slots (`torch.Tensor` of shape `(nnzb,)`): its place in `values`.
    """

    offsets: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor
    slots: torch.Tensor


@dataclass
class _Derived:
    """The walks derived from one `block_index` tensor, valid while the tensor is what it was."""

    source: weakref.ref[torch.Tensor]
    state: tuple[int, int, int]
    walks: dict[tuple[Shape, Shape, bool], Walk] = field(default_factory=dict)


_derived: dict[int, _Derived] = {}


def _walk(block_index: torch.Tensor, shape: Shape, block_shape: Shape, by_column: bool) -> Walk:
    """The walk of a topology; derived again only after the tensor has changed."""
    if block_index.is_inference():  # has no version: a change would go unnoticed
        return _derive_walk(block_index, shape, block_shape, by_column)
    key = id(block_index)
    state = block_index._version, block_index.data_ptr(), block_index.numel()
    entry = _derived.get(key)
    if entry is None or entry.source() is not block_index or entry.state != state:
        entry = _derived[key] = _Derived(weakref.ref(block_index, lambda dead: _evict(key, dead)), state)
    walk = entry.walks.get((shape, block_shape, by_column))
    if walk is None:
        walk = entry.walks[shape, block_shape, by_column] = _derive_walk(block_index, shape, block_shape, by_column)
    return walk


def _evict(key: int, dead: weakref.ref[torch.Tensor]) -> None:
    # The id may belong to a newer tensor by now.
    entry = _derived.get(key)
    if entry is not None and entry.source is dead:
        del _derived[key]


def _derive_walk(block_index: torch.Tensor, shape: Shape, block_shape: Shape, by_column: bool) -> Walk:
    layout = BlockLayout(block_index, shape, block_shape)
    layout.validate()  # an id out of range would read and write foreign memory
    slots = layout.column_order if by_column else layout.row_order
    offsets = layout.column_offsets if by_column else layout.row_offsets
    return Walk(offsets.int(), layout.rows[slots].int(), layout.columns[slots].int(), slots.int())

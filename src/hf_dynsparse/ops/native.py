"""
The backend of the processor: the kernels of `csrc/`, compiled once per instruction set and called through ctypes.

The library shares PyTorch's OpenMP threads and obeys `torch.set_num_threads`. Bit-reproducible for a given number of
threads. Sums are float32 for every dtype.
"""

import ctypes
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

from .orders import BlockOrder, block_order, derived
from .reference import Shape


__all__ = ["backward", "break_even", "dds", "dropout", "sdd", "why_not"]

logger = logging.getLogger(__name__)

# What csrc/block_sparse.cpp instantiates.
BLOCK_SHAPES = ((1, 1), (1, 4), (4, 4), (8, 8), (16, 16), (32, 32), (64, 64))
DTYPES = (torch.float32, torch.bfloat16)

# What `best_variant` of the portable library answers -> the library for that processor; the best first.
VARIANTS = {5: "x86_64_v4_bf16", 4: "x86_64_v4", 3: "x86_64_v3", 0: "portable"}

INTERFACE_VERSION = 3

_BUILD = "Build it with a C++ compiler: pip install -e . (or python setup.py build_ext --inplace)"


class LibraryUnavailable(Exception):
    """The compiled library of a variant cannot be used; the message says why."""


class _Layer(ctypes.Structure):
    """`Layer` of csrc/block_sparse.cpp."""

    _fields_ = [(name, ctypes.c_int32) for name in ("rows", "columns", "depth", "threads")] + [
        (name, ctypes.c_int64) for name in ("tokens", "out_features", "in_features", "nnzb")
    ]


class _Order(ctypes.Structure):
    """`Order` of csrc/orders.hpp: the addresses of a `BlockOrder`, which it keeps alive."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("offsets", "rows", "columns", "slots")]

    def __init__(self, order: BlockOrder) -> None:
        self.order = order
        super().__init__(*(tensor.data_ptr() for tensor in (order.offsets, order.rows, order.columns, order.slots)))


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
    layer, order, address = ctypes.POINTER(_Layer), ctypes.POINTER(_Order), ctypes.c_void_p
    library.forward.argtypes = [layer, order, *[address] * 4]
    library.backward.argtypes = [layer, order, order, *[address] * 6]
    number, size, real = ctypes.c_int, ctypes.c_int64, ctypes.c_float
    library.dropout.argtypes = [number, number, size, ctypes.c_uint64, ctypes.c_uint32, real, address, address]
    library.dropout.restype = None
    return library


@contextmanager
def use_variant(variant: str) -> Iterator[None]:
    """
    Use the kernels for another instruction set inside the `with` block, to test or to measure them.

    Raises:
        LibraryUnavailable: if they are not built, or the processor lacks the instructions.
    """
    levels = {name: level for level, name in VARIANTS.items()}
    best = load_variant("portable").best_variant()
    if levels.get(variant, best + 1) > best:
        raise LibraryUnavailable(f"This processor runs {', '.join(levels)} up to {VARIANTS[best]}. Got {variant!r}.")
    global _forced
    before, _forced = _forced, (variant, load_variant(variant))
    try:
        yield
    finally:
        _forced = before


_forced: tuple[str, ctypes.CDLL] | None = None


def _best() -> tuple[str, ctypes.CDLL] | str:
    """The library for this processor under its name, or why there is none."""
    return _forced or _find_best()


@cache
def _find_best() -> tuple[str, ctypes.CDLL] | str:
    try:
        best = load_variant("portable").best_variant()
    except LibraryUnavailable as reason:
        return str(reason)
    for level, variant in VARIANTS.items():
        if level <= best:
            try:
                return variant, load_variant(variant)
            except LibraryUnavailable as reason:  # an old compiler may not know the newest instructions
                logger.warning("The kernels for %s cannot be used, slower ones serve: %s", variant, reason)
    raise AssertionError("the portable library was loaded above")


def why_not(device: torch.device, dtype: torch.dtype, block_shape: Shape) -> str | None:
    """Why these operands cannot be served, or `None` if they can."""
    if device.type != "cpu":
        return "runs on the processor"
    if dtype not in DTYPES:
        return f"needs {' or '.join(str(dtype).removeprefix('torch.') for dtype in DTYPES)}"
    if block_shape not in BLOCK_SHAPES:
        return f"needs blocks of {', '.join(f'{rows} x {columns}' for rows, columns in BLOCK_SHAPES)}"
    best = _best()
    return best if isinstance(best, str) else None


def break_even(device: torch.device, block_shape: Shape) -> float:
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
    `input @ W.T + bias`, or `input @ W` if `transposed` (the input gradient); see `hf_dynsparse.ops.reference.dds`.
    """
    if transposed:
        grad_input, _, _ = backward(input, None, values, block_index, shape, (True, False, False))
        assert grad_input is not None
        return grad_input if bias is None else grad_input.add_(bias)
    dtype, block_shape = input.dtype, _block_shape(values)
    kernel = _kernel_dtype(dtype, block_shape)
    # Named, so that copies live until the call has returned.
    input, values = _readable(input, kernel), _readable(values, kernel)
    bias = None if bias is None else _readable(bias, torch.float32)
    output = input.new_empty(input.shape[0], shape[0])
    _call(
        "forward",
        _layer(input.shape[0], shape, block_shape, block_index, kernel),
        [derived(_order, block_index, shape, block_shape, False)],
        [input, values, bias, output],
    )
    return output if kernel == dtype else output.to(dtype)


def sdd(
    grad: torch.Tensor, input: torch.Tensor, block_index: torch.Tensor, shape: Shape, block_shape: Shape
) -> torch.Tensor:
    """The active blocks of `grad.T @ input`; see `hf_dynsparse.ops.reference.sdd`."""
    values = grad.new_empty(block_index.numel(), *block_shape)  # only its shape is read
    _, grad_values, _ = backward(grad, input, values, block_index, shape, (False, True, False))
    assert grad_values is not None
    return grad_values


def backward(
    grad: torch.Tensor,
    input: torch.Tensor | None,
    values: torch.Tensor,
    block_index: torch.Tensor,
    shape: Shape,
    wanted: tuple[bool, bool, bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """
    The gradients of input, values and bias, each `None` unless wanted: one pass over `grad`; see
    `Backend.backward`. `input` may be `None` if only others than `values` want one.
    """
    dtype, block_shape = grad.dtype, _block_shape(values)
    kernel = _kernel_dtype(dtype, block_shape)
    grad, values = _readable(grad, kernel), _readable(values, kernel)
    input = None if input is None else _readable(input, kernel)
    grad_input = grad.new_empty(grad.shape[0], shape[1]) if wanted[0] else None
    grad_values = grad.new_empty(values.shape, dtype=torch.float32) if wanted[1] else None
    grad_bias = grad.new_empty(shape[0], dtype=torch.float32) if wanted[2] else None
    _call(
        "backward",
        _layer(grad.shape[0], shape, block_shape, block_index, kernel),
        [derived(_order, block_index, shape, block_shape, by_column) for by_column in (False, True)],
        [grad, input, values, grad_input, grad_values, grad_bias],
    )
    grad_input, grad_values, grad_bias = (
        None if result is None else result.to(dtype) for result in (grad_input, grad_values, grad_bias)
    )
    return grad_input, grad_values, grad_bias


def dropout(input: torch.Tensor, seed: int, p: float) -> torch.Tensor:
    """
    `input` with entries zeroed with probability `p` in (0, 1) and the others divided by `1 - p`. The same `seed` (64
    bits) zeroes the same places, whatever the number of threads.
    """
    best = _best()
    if isinstance(best, str):
        raise RuntimeError(f"The native backend cannot run: {best}.")
    input = _readable(input, input.dtype)
    output = torch.empty_like(input)
    depth = 2 if input.dtype == torch.bfloat16 else 1
    threshold, scale = min(round(p * 2**32), 2**32 - 1), 1 / (1 - p)
    best[1].dropout(
        *(depth, torch.get_num_threads(), input.numel(), seed & (2**64 - 1), threshold, scale),
        *_addresses(input, output),
    )
    return output


def _block_shape(values: torch.Tensor) -> Shape:
    _, rows, columns = values.shape
    return rows, columns


def _kernel_dtype(dtype: torch.dtype, block_shape: Shape) -> torch.dtype:
    """bfloat16 is multiplied as such where the processor can and blocks hold pairs both ways; else it is widened."""
    best = _best()
    paired = not isinstance(best, str) and best[0].endswith("bf16") and block_shape[0] > 1
    return dtype if paired else torch.float32


def _readable(tensor: torch.Tensor, kernel: torch.dtype) -> torch.Tensor:
    """`tensor` as the kernels read it: in rows, and in units of four bytes, which pairs may lie across."""
    if tensor.dtype != kernel:
        tensor = tensor.to(kernel)
    if tensor.is_neg():  # a view whose signs PyTorch turns when it reads
        tensor = tensor.resolve_neg()
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 4 else tensor


def _order(block_index: torch.Tensor, shape: Shape, block_shape: Shape, by_column: bool) -> _Order:
    return _Order(block_order(block_index, shape, block_shape, by_column))


def _layer(tokens: int, shape: Shape, block_shape: Shape, block_index: torch.Tensor, kernel: torch.dtype) -> _Layer:
    depth = 2 if kernel == torch.bfloat16 else 1
    return _Layer(*block_shape, depth, torch.get_num_threads(), tokens, *shape, block_index.numel())


def _call(product: str, layer: _Layer, orders: list[_Order], tensors: list[torch.Tensor | None]) -> None:
    best = _best()
    if isinstance(best, str):
        raise RuntimeError(f"The native backend cannot run: {best}.")
    if getattr(best[1], product)(layer, *orders, *_addresses(*tensors)):
        raise RuntimeError(f"The native backend has no {product} for {layer.rows} x {layer.columns} blocks.")


def _addresses(*tensors: torch.Tensor | None) -> list[int | None]:
    addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    if 0 in addresses and any(tensor is not None and tensor.numel() and not tensor.data_ptr() for tensor in tensors):
        raise ValueError(
            "The operands of a product must be in memory. Got one whose storage has been freed. Bring it back first, "
            "as FSDP does before a layer runs."
        )
    return addresses

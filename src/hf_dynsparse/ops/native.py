"""
The backend of the CPU: the kernels of `csrc/`, compiled once per instruction set and called through ctypes.

The library shares PyTorch's OpenMP threads and obeys `torch.set_num_threads`. Bit-reproducible for a given number of
threads. Sums are float32 for every dtype.
"""

import ctypes
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import torch

from ..blocks.layout import BlockLayout, BlockOrder
from .reference import Shape


__all__ = ["backward", "break_even", "cross_entropy", "dds", "dropout", "residual_norm", "sdd", "why_not"]

logger = logging.getLogger(__name__)

# What csrc/block_sparse.cpp instantiates.
BLOCK_SHAPES = ((1, 1), (1, 4), (4, 4), (8, 8), (16, 16), (32, 32), (64, 64))
DTYPES = (torch.float32, torch.bfloat16)

# What `best_variant` of the portable library answers -> the library for that CPU; the best first.
VARIANTS = {5: "x86_64_v4_bf16", 4: "x86_64_v4", 3: "x86_64_v3", 0: "portable"}

INTERFACE_VERSION = 4

_BUILD = "Build it with a C++ compiler: pip install -e . (or python setup.py build_ext --inplace)"


class LibraryUnavailable(Exception):
    """The compiled library of a variant cannot be used; the message says why."""


class _Layer(ctypes.Structure):
    """`Layer` of csrc/block_sparse.cpp."""

    _fields_ = [(name, ctypes.c_int32) for name in ("rows", "columns", "depth", "threads")] + [
        (name, ctypes.c_int64) for name in ("tokens", "out_features", "in_features", "nnzb")
    ]


class _Residual(ctypes.Structure):
    """`Residual` of csrc/residual_norm.hpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "width")),
        *(("seed", ctypes.c_uint64), ("threshold", ctypes.c_uint32)),
        *((name, ctypes.c_float) for name in ("scale", "epsilon")),
        ("threads", ctypes.c_int),
    ]


class _Order(ctypes.Structure):
    """`Order` of csrc/orders.hpp: the addresses of a [`BlockOrder`], which it keeps alive."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("offsets", "rows", "columns", "slots")]

    def __init__(self, order: BlockOrder) -> None:
        self.order = order
        super().__init__(*(tensor.data_ptr() for tensor in (order.offsets, order.rows, order.columns, order.slots)))


def open_library(name: str, version: int) -> ctypes.CDLL:
    """
    Load one of the compiled libraries beside this file.

    Raises:
        LibraryUnavailable: if it is not built, does not load or comes from other sources.
    """
    path = Path(__file__).with_name(name)
    if not path.is_file():
        raise LibraryUnavailable(f"{name} is not built. {_BUILD}")
    try:
        # torch is loaded by now, so its libgomp.so.1, and with it its threads, are the ones the library gets.
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise LibraryUnavailable(f"{name} does not load ({error}). {_BUILD}") from error
    found = library.interface_version()
    if found != version:
        raise LibraryUnavailable(f"{name} must have interface {version}. Got {found}. {_BUILD}")
    return library


@cache
def load_variant(variant: str) -> ctypes.CDLL:
    """
    Load the compiled kernels for one instruction set.

    Raises:
        LibraryUnavailable: as `open_library`.
    """
    library = open_library(f"_native_{variant}.so", INTERFACE_VERSION)
    layer, order, address = ctypes.POINTER(_Layer), ctypes.POINTER(_Order), ctypes.c_void_p
    library.forward.argtypes = [layer, order, *[address] * 4]
    library.backward.argtypes = [layer, order, order, *[address] * 6]
    number, size, real = ctypes.c_int, ctypes.c_int64, ctypes.c_float
    library.dropout.argtypes = [number, number, size, ctypes.c_uint64, ctypes.c_uint32, real, address, address]
    library.dropout.restype = None
    library.cross_entropy.argtypes = [number, size, size, *[address] * 4]
    library.cross_entropy.restype = size
    library.cross_entropy_backward.argtypes = [number, size, size, *[address] * 5]
    library.cross_entropy_backward.restype = None
    library.residual_norm.argtypes = [ctypes.POINTER(_Residual), *[address] * 7]
    library.residual_norm.restype = None
    library.residual_norm_backward.argtypes = [ctypes.POINTER(_Residual), *[address] * 10]
    library.residual_norm_backward.restype = None
    return library


@contextmanager
def use_variant(variant: str) -> Iterator[None]:
    """
    Use the kernels for another instruction set inside the `with` block, to test or to measure them.

    Raises:
        LibraryUnavailable: if they are not built, or the CPU lacks the instructions.
    """
    levels = {name: level for level, name in VARIANTS.items()}
    best = load_variant("portable").best_variant()
    if levels.get(variant, best + 1) > best:
        raise LibraryUnavailable(f"This CPU runs {', '.join(levels)} up to {VARIANTS[best]}. Got {variant!r}.")
    global _forced
    before, _forced = _forced, (variant, load_variant(variant))
    try:
        yield
    finally:
        _forced = before


_forced: tuple[str, ctypes.CDLL] | None = None


def _best() -> tuple[str, ctypes.CDLL] | str:
    """The library for this CPU under its name, or why there is none."""
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
        return "runs on the CPU"
    if dtype not in DTYPES:
        return f"needs {' or '.join(str(dtype).removeprefix('torch.') for dtype in DTYPES)}"
    if block_shape not in BLOCK_SHAPES:
        return f"needs blocks of {', '.join(f'{rows} x {columns}' for rows, columns in BLOCK_SHAPES)}"
    best = _best()
    return best if isinstance(best, str) else None


def break_even(device: torch.device, block_shape: Shape) -> float:
    """
    Density above which the dense product is faster: measured at 256 x 256 and 768 x 768, 4,096 tokens, on
    an AVX-512 CPU.
    """
    return 0.6 if block_shape[0] > 1 else 0.25


@dataclass(frozen=True, eq=False)
class _Kernels:
    """
    What the kernels need to know of a layout, whatever passes through the layer.

    Args:
        dtype (`torch.dtype`): of the operands that they read.
        format (`tuple[int, int, int]`): rows, columns and depth, as in `_Layer`.
        sizes (`tuple[int, int, int]`): out_features, in_features and nnzb.
        forward, backward: the functions of csrc/block_sparse.cpp.
        by_row (`_Order`): the order of the blocks that both read.
    """

    dtype: torch.dtype
    format: tuple[int, int, int]
    sizes: tuple[int, int, int]
    forward: Callable[..., int]
    backward: Callable[..., int]
    by_row: _Order


_layer = lru_cache(4096)(_Layer)  # the kernels do not write to it


def dds(
    input: torch.Tensor, values: torch.Tensor, layout: BlockLayout, bias: torch.Tensor | None, transposed: bool
) -> torch.Tensor:
    """`input @ W.T + bias`, or `input @ W` if `transposed` (the input gradient); see `reference.dds`."""
    if transposed:
        grad_input, _, _ = backward(input, None, values, layout, (True, False, False))
        assert grad_input is not None
        return grad_input if bias is None else grad_input.add_(bias)
    dtype = input.dtype
    kernels: _Kernels = layout.results.get((_kernels, dtype, _forced)) or layout.derived(_kernels, dtype, _forced)
    if dtype != kernels.dtype:
        input, values = input.to(kernels.dtype), values.to(kernels.dtype)
    if bias is not None and bias.dtype != torch.float32:
        bias = bias.to(torch.float32)
    output = input.new_empty(input.shape[0], layout.shape[0])
    readable, addresses = _readable(input, values, bias)
    layer = _layer(*kernels.format, torch.get_num_threads(), input.shape[0], *kernels.sizes)
    if kernels.forward(layer, kernels.by_row, *addresses, output.data_ptr()):
        raise RuntimeError(f"The native backend has no forward for {layer.rows} x {layer.columns} blocks.")
    return output if dtype == kernels.dtype else output.to(dtype)


def sdd(grad: torch.Tensor, input: torch.Tensor, layout: BlockLayout) -> torch.Tensor:
    """The active blocks of `grad.T @ input`; see `reference.sdd`."""
    _, grad_values, _ = backward(grad, input, None, layout, (False, True, False))
    assert grad_values is not None
    return grad_values


def backward(
    grad: torch.Tensor,
    input: torch.Tensor | None,
    values: torch.Tensor | None,
    layout: BlockLayout,
    wanted: tuple[bool, bool, bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """
    The gradients of input, values and bias, each `None` unless wanted, in one pass over `grad`; see
    `Backend.backward`. Only the gradient of `values` needs `input`, only that of `input` needs `values`.
    """
    dtype = grad.dtype
    kernels: _Kernels = layout.derived(_kernels, dtype, _forced)
    if dtype != kernels.dtype:
        grad = grad.to(kernels.dtype)
        input = None if input is None else input.to(kernels.dtype)
        values = None if values is None else values.to(kernels.dtype)
    tokens, (out_features, in_features) = grad.shape[0], layout.shape
    results = (
        grad.new_empty(tokens, in_features) if wanted[0] else None,
        grad.new_empty(layout.nnzb, *layout.block_shape, dtype=torch.float32) if wanted[1] else None,
        grad.new_empty(out_features, dtype=torch.float32) if wanted[2] else None,
    )
    readable, addresses = _readable(grad, input, values, *results)
    layer = _layer(*kernels.format, torch.get_num_threads(), tokens, *kernels.sizes)
    if kernels.backward(layer, kernels.by_row, layout.derived(_column_order), *addresses):
        raise RuntimeError(f"The native backend has no backward for {layer.rows} x {layer.columns} blocks.")
    of_input, of_values, of_bias = results
    if dtype == torch.float32:
        return results
    return (
        None if of_input is None else of_input.to(dtype),
        None if of_values is None else of_values.to(dtype),
        None if of_bias is None else of_bias.to(dtype),
    )


def dropout(input: torch.Tensor, seed: int, p: float) -> torch.Tensor:
    """
    `input` with entries zeroed with probability `p` in (0, 1) and the others divided by `1 - p`. The same `seed` (64
    bits) zeroes the same places, whatever the number of threads.
    """
    output = torch.empty_like(input, memory_format=torch.contiguous_format)
    readable, addresses = _readable(input, output)
    depth = 2 if input.dtype == torch.bfloat16 else 1
    _library()[1].dropout(depth, torch.get_num_threads(), input.numel(), *_dropout_numbers(seed, p), *addresses)
    return output


def _dropout_numbers(seed: int, p: float) -> tuple[int, int, float]:
    """Seed, threshold and scale of csrc/dropout.hpp."""
    return seed & (2**64 - 1), min(round(p * 2**32), 2**32 - 1), 1 / (1 - p)


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The losses of rows of `logits`, of shape `(rows, classes)` and float32, 0 where the label is -100; and what
    `cross_entropy_backward` needs of each row.

    Raises:
        IndexError: for a label that is no class.
    """
    (rows, classes), threads = logits.shape, torch.get_num_threads()
    losses, sums = logits.new_empty(rows), logits.new_empty(rows, 2)
    readable, addresses = _readable(logits, labels, losses, sums)
    wrong = _library()[1].cross_entropy(threads, rows, classes, *addresses)
    if wrong < rows:
        raise IndexError(f"Labels must be classes, below {classes}, or -100. Got {int(labels[wrong])}.")
    return losses, sums


def cross_entropy_backward(
    grad: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor, sums: torch.Tensor
) -> torch.Tensor:
    """The gradient of `logits` from that of the losses, `grad` of shape `(rows,)`."""
    output = torch.empty_like(logits, memory_format=torch.contiguous_format)
    readable, addresses = _readable(grad, logits, labels, sums, output)
    _library()[1].cross_entropy_backward(torch.get_num_threads(), *logits.shape, *addresses)
    return output


def residual_norm(
    input: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    epsilon: float,
    seed: int,
    p: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Layer normalisation of `dropout(input, seed, p) + residual`, or with `p` 0 of `input + residual`: the output, and
    the means and inverse deviations that `residual_norm_backward` needs. The width is a multiple of 16.
    """
    rows, output = input.numel() // input.shape[-1], input.new_empty(input.shape)
    mean, deviation = input.new_empty(rows), input.new_empty(rows)
    readable, addresses = _readable(input, residual, weight, bias, mean, deviation, output)
    _library()[1].residual_norm(_residual(input, epsilon, seed, p), *addresses)
    return output, mean, deviation


def residual_norm_backward(
    grad: torch.Tensor,
    input: torch.Tensor,
    residual: torch.Tensor,
    mean: torch.Tensor,
    deviation: torch.Tensor,
    weight: torch.Tensor,
    seed: int,
    p: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of input, residual, weight and bias; with `p` 0 the first two are one tensor."""
    of_residual, of_input = grad.new_empty(grad.shape), grad.new_empty(grad.shape) if p else None
    of_weight, of_bias = grad.new_empty(grad.shape[-1]), grad.new_empty(grad.shape[-1])
    operands = grad, input, residual, mean, deviation, weight, of_input, of_residual, of_weight, of_bias
    readable, addresses = _readable(*operands)
    _library()[1].residual_norm_backward(_residual(grad, 0.0, seed, p), *addresses)
    return of_residual if of_input is None else of_input, of_residual, of_weight, of_bias


def _residual(input: torch.Tensor, epsilon: float, seed: int, p: float) -> _Residual:
    seed, threshold, scale = _dropout_numbers(seed, p)
    width, threads = input.shape[-1], torch.get_num_threads()
    return _Residual(input.numel() // width, width, seed, threshold, scale, epsilon, threads)


def _library() -> tuple[str, ctypes.CDLL]:
    best = _best()
    if isinstance(best, str):
        raise RuntimeError(f"The native backend cannot run: {best}.")
    return best


def _kernels(layout: BlockLayout, dtype: torch.dtype, forced: object) -> _Kernels:
    """Those for operands of `dtype`, of the variant that is `forced` or the best."""
    variant, library = _library()
    rows, columns = layout.block_shape
    # bfloat16 is multiplied as such where the CPU can and blocks hold pairs both ways; else it is widened.
    paired = dtype == torch.bfloat16 and variant.endswith("bf16") and rows > 1
    return _Kernels(
        dtype=dtype if paired else torch.float32,
        format=(rows, columns, 2 if paired else 1),
        sizes=(*layout.shape, layout.nnzb),
        forward=library.forward,
        backward=library.backward,
        by_row=_Order(layout.by_row),
    )


def _column_order(layout: BlockLayout) -> _Order:
    return _Order(layout.by_column)


def _readable(*tensors: torch.Tensor | None) -> tuple[list[torch.Tensor | None], list[int | None]]:
    """
    `tensors` as the kernels read them, in rows and in units of four bytes, which pairs may lie across; and their
    addresses. Keep the tensors until the kernel has returned: some are copies. What the kernels write comes as it is.

    Raises:
        ValueError: if the storage of one has been freed.
    """
    readable: list[torch.Tensor | None] = []
    addresses: list[int | None] = []
    for tensor in tensors:
        address = None
        if tensor is not None:
            if tensor.is_neg():  # a view whose signs PyTorch turns when it reads
                tensor = tensor.resolve_neg()
            tensor = tensor.contiguous()
            address = tensor.data_ptr()
            if address % 4:
                tensor = tensor.clone()
                address = tensor.data_ptr()
            elif not address and tensor.numel():
                raise ValueError(
                    "The operands of a product must be in memory. Got one whose storage has been freed. Bring it back "
                    "first, as FSDP does before a layer runs."
                )
        readable.append(tensor)
        addresses.append(address)
    return readable, addresses

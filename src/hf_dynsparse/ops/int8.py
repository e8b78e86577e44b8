"""
Products with int8 weights and uint8 inputs on the CPU: the kernels of `csrc/int8.cpp`, compiled once per instruction
set and called through ctypes. Sums are int32 and exact.

A weight is packed once for them: in strips of a few rows, each a list of quads, four neighbouring features wide, that
hold at least one of its entries. Any block shape, and a dense matrix, becomes that.
"""

import ctypes
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from math import gcd
from pathlib import Path

import torch

from . import choice
from .native import LibraryUnavailable, open_library
from .reference import Shape
from .transforms import is_plain


logger = logging.getLogger(__name__)

# What `runs` of the portable library is asked -> the library; the best first.
VARIANTS = {4: "x86_64_v4_vnni", 3: "x86_64_v4", 2: "x86_64_v3_vnni", 1: "x86_64_v3", 0: "portable"}

INTERFACE_VERSION = 1

QUAD = 4
STRIP = 4  # rows, or 1 where blocks have no 4
# Where products are added in pairs of 16 bits: 255 times this fits.
LARGEST_PAIR = 128


class _Layer(ctypes.Structure):
    """`Int8Layer` of csrc/int8.cpp, with its `Rounding` and `Strips` written out."""

    _fields_ = [
        ("height", ctypes.c_int32),
        ("reciprocal", ctypes.c_float),
        ("zero_point", ctypes.c_int32),
        *((name, ctypes.c_int64) for name in ("out_features", "in_features")),
        *((name, ctypes.c_void_p) for name in ("offsets", "quads", "values", "starts", "bias")),
        ("step", ctypes.c_float),
    ]


class Ending(ctypes.Structure):
    """
    `Ending` of csrc/int8.cpp: what follows a product in the same call, `layer_norm(product + residual)`. All float32.

    Args:
        residual (`torch.Tensor` of the shape of the product).
        weight, bias (`torch.Tensor` of shape `(out_features,)`).
        eps (`float`).
    """

    _fields_ = [*((name, ctypes.c_void_p) for name in ("residual", "weight", "bias")), ("epsilon", ctypes.c_float)]

    def __init__(self, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> None:
        self.tensors = [tensor.resolve_neg().contiguous() for tensor in (residual, weight, bias)]
        super().__init__(*(tensor.data_ptr() for tensor in self.tensors), eps)


@cache
def load_variant(variant: str) -> ctypes.CDLL:
    """
    Load the compiled kernels for one instruction set.

    Raises:
        LibraryUnavailable: if it is not built, does not load or comes from other sources.
    """
    library = open_library(f"_native_int8_{variant}.so", INTERFACE_VERSION)
    address = ctypes.c_void_p
    layer, numbers = ctypes.POINTER(_Layer), (ctypes.c_int, ctypes.c_int64)
    library.int8_linear.argtypes = [layer, layer, ctypes.POINTER(Ending), *numbers, address, address]
    return library


@contextmanager
def use_variant(variant: str | None) -> Iterator[None]:
    """
    Pack weights for another instruction set inside the `with` block, or for none, to test or to measure them. What is
    packed already stays as it is.

    Raises:
        LibraryUnavailable: if the kernels are not built, or the CPU lacks the instructions.
    """
    global _forced
    if variant is not None and variant not in runnable():
        raise LibraryUnavailable(f"This CPU runs {', '.join(runnable())}. Got {variant!r}.")
    before, _forced = _forced, (None if variant is None else load_variant(variant),)
    try:
        yield
    finally:
        _forced = before


_forced: tuple[ctypes.CDLL | None] | None = None


def runnable() -> list[str]:
    """The variants for which this CPU has the instructions, the best first."""
    portable = load_variant("portable")
    return [variant for level, variant in VARIANTS.items() if portable.runs(level)]


@cache
def find_best() -> ctypes.CDLL | None:
    """
    The library for this CPU, if there is one that is worth it: the portable one is for tests, since the kernels for
    floating-point numbers are faster.
    """
    try:
        for variant in runnable()[:-1]:
            try:
                return load_variant(variant)
            except LibraryUnavailable as reason:  # an old compiler may not know the newest instructions
                logger.warning("The int8 kernels for %s cannot be used, slower ones serve: %s", variant, reason)
    except LibraryUnavailable as reason:
        logger.info("Int8 layers compute with floating-point numbers: %s", reason)
    return None


@dataclass(frozen=True, eq=False)
class PackedLinear:
    """
    A layer as the kernels read it.

    Args:
        library: that it was packed for.
        layer (`_Layer`): addresses of what `tensors` keeps alive.
        in_features, out_features (`int`).
        tensors: offsets, quads, values, starts and bias.
    """

    library: ctypes.CDLL
    layer: _Layer
    in_features: int
    out_features: int
    tensors: tuple[torch.Tensor, ...]

    @property
    def name(self) -> str:
        """Of the library."""
        return Path(self.library._name).stem

    @property
    def nbytes(self) -> int:
        """What the packed copy takes in memory."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def serves(self, input: torch.Tensor) -> bool:
        """Whether `multiply` takes `input`: float32 on the CPU, in eager mode, and no other backend is asked for."""
        return (
            input.dtype is torch.float32
            and input.is_cpu
            and not torch.compiler.is_compiling()
            and choice.requested in (None, "native")
            and is_plain(input)
            and input.dim() > 0
            and input.shape[-1] == self.in_features
        )

    def multiply(
        self, input: torch.Tensor, then: "PackedLinear | None" = None, ending: Ending | None = None
    ) -> torch.Tensor | None:
        """
        `input` of shape `(..., in_features)`, rounded, to `(..., out_features)`.

        Args:
            then ([`PackedLinear`], *optional*): a second layer, packed for the same library, that is given GELU of the
                outputs of this one.
            ending ([`Ending`], *optional*): what follows.

        Returns:
            `torch.Tensor`, or `None` if a number on the way is not finite, which no integer stands for.
        """
        input = input.resolve_neg().contiguous()
        output = input.new_empty(*input.shape[:-1], (then or self).out_features)
        tokens = input.numel() // self.in_features
        operands = torch.get_num_threads(), tokens, input.data_ptr(), output.data_ptr()
        found = self.library.int8_linear(self.layer, then and then.layer, ending, *operands)
        return output if found == 0 else None


def pack(
    values: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
    shape: Shape,
    *,
    zero_point: int,
    input_scale: torch.Tensor,
    step: float,
    bias: torch.Tensor | None,
) -> PackedLinear | None:
    """
    Pack the weight of a layer for the kernels of this CPU.

    Args:
        values (`torch.Tensor` of shape `(nnzb, block rows, block columns)`, `torch.int8`): the active blocks.
        rows, columns (`torch.Tensor` of shape `(nnzb,)`, `torch.int64`): block row and block column of each.
        shape (`tuple[int, int]`): `(out_features, in_features)`.
        zero_point (`int`), input_scale (`torch.Tensor` of shape `()`, `torch.float32`): what inputs are rounded by.
        step (`float`): what 1 means in a product of integers.
        bias (`torch.Tensor` of shape `(out_features,)`, `torch.float32`, *optional*): is added to the product.

    Returns:
        [`PackedLinear`], or `None` if no kernel can serve: there is none for this CPU, the weight is not on it, or its
        rows are longer than 16-bit indices reach.
    """
    library = find_best() if _forced is None else _forced[0]
    if library is None or not values.is_cpu or shape[1] > QUAD * 2**15:
        return None
    strips, quads, packed, height = _strips(values, rows, columns, shape[1])
    if library.adds_pairs():
        strips, quads, packed = _halve_heavy_quads(strips, quads, packed)
    sums = torch.zeros(shape[0] // height, height, dtype=torch.int64)
    sums.index_add_(0, strips, packed.sum(2, dtype=torch.int64))
    tensors = (
        torch.searchsorted(strips, torch.arange(shape[0] // height + 1), out_int32=True),
        quads.short(),
        packed.contiguous(),
        (-zero_point * sums.flatten()).int(),
        torch.zeros(shape[0], dtype=torch.float32) if bias is None else bias.contiguous(),
    )
    sizes, addresses = shape, (tensor.data_ptr() for tensor in tensors)
    layer = _Layer(height, float(input_scale.reciprocal()), zero_point, *sizes, *addresses, step)
    return PackedLinear(library, layer, shape[1], shape[0], tensors)


def _strips(
    values: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, in_features: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """
    The quads that hold a block, strip by strip.

    Returns:
        `tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]`: strip and quad of each, int64 of shape `(count,)` in
        ascending order, their entries, int8 of shape `(count, height, QUAD)`, and the height of a strip.
    """
    nnzb, block_rows, block_columns = values.shape
    height = STRIP if block_rows % STRIP == 0 else 1
    width = gcd(block_columns, QUAD)  # pieces of so many features lie in one quad each
    down, across = block_rows // height, block_columns // width
    pieces = values.view(nnzb, down, height, across, width).transpose(2, 3)  # [nnzb, down, across, height, width]
    strip = rows[:, None, None] * down + torch.arange(down)[:, None]  # [nnzb, down, 1]
    piece = columns[:, None, None] * across + torch.arange(across)  # [nnzb, 1, across]
    quads_across = -(-in_features // QUAD)
    keys, where = (strip * quads_across + piece * width // QUAD).flatten().unique(return_inverse=True)
    packed = values.new_zeros(len(keys), QUAD // width, height, width)
    place = (piece % (QUAD // width)).expand(nnzb, down, across).flatten()
    packed[where, place] = pieces.reshape(-1, height, width)
    packed = packed.transpose(1, 2).reshape(-1, height, QUAD)
    return keys // quads_across, keys % quads_across, packed, height


def _halve_heavy_quads(
    strips: torch.Tensor, quads: torch.Tensor, packed: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Write a quad with a pair of weights that 16 bits could not hold twice, each time with half of them."""
    pairs = packed.short().abs().unflatten(2, (2, 2)).sum(3)  # [count, height, 2]
    times = 1 + (pairs > LARGEST_PAIR).flatten(1).any(1).long()
    twice = torch.arange(len(times)).repeat_interleave(times)
    halves = packed[twice]
    first = torch.cat([twice.new_zeros(1), twice.diff()]) != 0
    first[:1] = True
    again = ~first
    is_split = (times == 2)[twice]
    lower = halves >> 1  # in [-64, 63], and the rest in [-63, 64]
    split = torch.where(again[:, None, None], halves - lower, lower)
    return strips[twice], quads[twice], torch.where(is_split[:, None, None], split, halves)

"""What several tests share: the tables of variants and tolerances, and matrices built the plain way."""

import math
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import combinations, product
from typing import Any

import pytest
import torch

from hf_dynsparse import BlockSparseLinear
from hf_dynsparse.ops import BACKENDS, native
from hf_dynsparse.topology import PRUNE_SCORES, REGROW_RULES, track_


# `block_size` as a user writes it; the unstructured case, squares, a row, a column and a rectangle.
BLOCK_SIZES = (1, 4, 8, 16, 32, (1, 4), (4, 1), (2, 8))

# Block rows and block columns; odd ones, a single block, a single row and a single column.
GRIDS = ((3, 5), (1, 1), (1, 6), (5, 1), (4, 4))

# 0 stands for a single active block.
DENSITIES = (0, 0.1, 1.0)

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# Prune scores and regrow rules know nothing of each other: each once, and a pair that shares the dense gradient.
SCORES_AND_RULES = (
    *((score, "random") for score in PRUNE_SCORES),
    *(("l1", rule) for rule in REGROW_RULES if rule != "random"),
    ("mest", "gradient"),
)

# Two ways to train the same network may differ by this much in a weight after thirty steps.
TRAINING_ATOL = {torch.float64: 1e-12, torch.float32: 1e-5}

# Measured DOF coverage against its expectation, on 512 x 512 positions.
COVERAGE_ATOL = 0.005

needs_kernels = pytest.mark.skipif(
    native.why_not(torch.device("cpu"), torch.float32, (1, 1)) is not None,
    reason="the C++ kernels are not built: no compiler at install time",
)


def variants(kernels: Any) -> list[str]:
    """Instruction sets of a module of compiled kernels that are built and that this processor runs."""
    found = []
    for variant in kernels.VARIANTS.values():
        with suppress(native.LibraryUnavailable), kernels.use_variant(variant):
            found.append(variant)
    return found


def serving(block_size: int | tuple[int, int], dtype: torch.dtype) -> list[str]:
    """Names of the backends that serve such blocks here, on a processor: tests are made for these and no others."""
    return [
        backend.name
        for backend in BACKENDS.values()
        if backend.why_not(torch.device("cpu"), dtype, sides(block_size)) is None
    ]


def cover_pairs(given: Sequence[tuple[Any, ...]], *axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """
    Each of `given` with a value of each axis, as few as a greedy choice needs for every value of an axis to meet every
    value of every other, and of every column of `given`.
    """

    def pairs(case: tuple[Any, ...]) -> set[tuple[Any, ...]]:
        return set(combinations(enumerate(case), 2))

    rest = list(product(*axes))
    wanted = set().union(*(pairs((*case, *more)) for case in given for more in rest))
    cases: list[tuple[Any, ...]] = []
    while wanted:
        for case in given:
            gain, more = max(((len(pairs((*case, *more)) & wanted), more) for more in rest), key=lambda item: item[0])
            if gain or len(cases) < len(given):
                cases.append((*case, *more))
                wanted -= pairs(cases[-1])
    return cases


def error_bound(
    dtype: torch.dtype, terms: int, sizes: torch.Tensor, exact: torch.Tensor, rounded_before: torch.Tensor
) -> float:
    """
    How large the norm of the error of sums in `dtype` may be, on any machine and in any order of the terms.

    Sums are made in float32, or in `dtype` if that is finer: each addition and each product rounds, so that a sum of
    `n` terms is off by at most `n` times half an epsilon of the sum of their absolute values (Higham, Accuracy and
    Stability of Numerical Algorithms, 3.1); twice that, because in float64 the truth is no better. The result is
    rounded to `dtype` at most twice, by half an epsilon each: the product, and the product with the bias.

    Args:
        terms (`int`): of a sum.
        sizes (`torch.Tensor`): the same sums of the absolute values of their terms.
        exact (`torch.Tensor`): the sums.
        rounded_before (`torch.Tensor`): what may have been rounded on the way: the sums without the bias.
    """
    sums = torch.finfo(torch.promote_types(dtype, torch.float32)).eps * terms * sizes.norm()
    return float(sums + torch.finfo(dtype).eps / 2 * (exact.norm() + rounded_before.norm()))


def generator(seed: int = 0) -> torch.Generator:
    """A CPU generator."""
    return torch.Generator().manual_seed(seed)


def sides(block_size: int | tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of a block."""
    return (block_size, block_size) if isinstance(block_size, int) else block_size


def make_layer(
    grid: tuple[int, int] = (4, 6),
    block_size: int | tuple[int, int] = 4,
    nnzb: int = 8,
    *,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    tracked: bool = False,
) -> BlockSparseLinear:
    """A layer of `grid` blocks with normal values, slots in random order and a bias that is not zero."""
    rows, columns = sides(block_size)
    layer = BlockSparseLinear(grid[1] * columns, grid[0] * rows, block_size, nnzb=nnzb, bias=bias, dtype=dtype)
    draw = generator(seed)
    with torch.no_grad():
        layer.block_index.copy_(torch.randperm(layer.num_blocks, generator=draw)[:nnzb])
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw, dtype=torch.float64))
    if tracked:
        track_(layer)
    return layer


def place_(layer: BlockSparseLinear, block_index: Iterable[int], values: Iterable[object]) -> BlockSparseLinear:
    """Give `layer` a topology and values written out by hand."""
    with torch.no_grad():
        layer.block_index.copy_(torch.tensor(list(block_index)))
        layer.values.copy_(torch.tensor(list(values), dtype=torch.float64).view_as(layer.values))
    return layer


def dense_weight(values: torch.Tensor, block_index: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """The dense matrix, block by block, by nobody's code but this."""
    _, rows, columns = values.shape
    weight = torch.zeros(shape, dtype=values.dtype)
    for block, place in zip(values.detach(), block_index.tolist(), strict=True):
        row, column = divmod(place, shape[1] // columns)
        weight[row * rows : (row + 1) * rows, column * columns : (column + 1) * columns] = block
    return weight


def blocks_of(dense: torch.Tensor, block_index: torch.Tensor, block_shape: tuple[int, int]) -> torch.Tensor:
    """The blocks of `dense` in the order of `block_index`, by the same plain loop."""
    rows, columns = block_shape
    taken = []
    for place in block_index.tolist():
        row, column = divmod(place, dense.shape[1] // columns)
        taken.append(dense[row * rows : (row + 1) * rows, column * columns : (column + 1) * columns])
    return torch.stack(taken)


def cosine_ratio(update: int, num_updates: int, pruning_ratio: float) -> float:
    """`pr(t) = pr/2 * (1 + cos(pi * t / n))`."""
    return pruning_ratio / 2 * (1 + math.cos(math.pi * update / num_updates))

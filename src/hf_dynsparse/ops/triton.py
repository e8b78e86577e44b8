"""
The backend of NVIDIA GPUs: gathered products in Triton, for square blocks from 16 x 16.

Both products walk the active blocks in an order derived from `block_index` and find each in `values` by its slot, so
`values` is never copied or permuted. The orders are made on the device, in shapes that do not depend on the topology:
nothing here waits for the GPU, and nothing is compiled again after a topology update. Bit-reproducible on one kind of
GPU: there are no atomic additions. Sums are float32 for every dtype; float32 operands are rounded to TF32 only where
`torch.backends.cuda.matmul.fp32_precision` allows it.
"""

from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec

import torch

from ..blocks.layout import BlockLayout, BlockOrder
from .reference import Shape


__all__ = ["break_even", "dds", "sdd", "why_not"]

SIDES = (16, 32, 64, 128)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# By side of a block, for a recent data-center GPU: each feature that is loaded serves one block row.
BREAK_EVEN = {16: 0.08, 32: 0.15, 64: 0.25, 128: 0.37}

# Up to so many tokens, smaller tiles: more programs than a large GPU has multiprocessors.
FEW_TOKENS = 4096
# From so many tokens, tiles of 256 tokens still fill a large GPU.
MANY_TOKENS = 16384

# Programs of `sample` for each multiprocessor of the GPU, reached by splitting the tokens.
PROGRAMS_PER_PROCESSOR = 4

# The number of multiprocessors where Triton interprets its kernels: enough to split the tokens in tests.
INTERPRETED_PROCESSORS = 8

SUMMED_ENTRIES = 1024  # of one program of `sum_splits`

# Float32 products multiply and add in one instruction: said aloud, since Triton 3.10 changes its default.
FUSED = {"enable_fp_fusion": True}


@dataclass(frozen=True)
class GatherTile:
    """
    How `dds` is cut: `tokens` of one block row (or column) in one program, `depth` input features in one iteration,
    by `warps` groups of 32 threads, with loads `stages` iterations under way.
    """

    tokens: int
    depth: int
    warps: int
    stages: int


@dataclass(frozen=True)
class SampleTile:
    """
    How `sdd` is cut: a `group` of blocks of one block row in one program, `tokens` in one iteration; `columns_first`
    is the orientation of the tile of sums.
    """

    group: int
    tokens: int
    warps: int
    stages: int
    columns_first: bool


# By side of a block. For compute capability 8.0 to 12.0, no tile spills a register or needs more shared memory than
# there is (tests/ops/test_triton_compile.py). None of them has been timed.
GATHER_16_BIT = {
    16: GatherTile(128, 64, 4, 4),
    32: GatherTile(128, 64, 4, 4),
    64: GatherTile(128, 64, 4, 3),
    128: GatherTile(128, 64, 8, 3),
}
GATHER_32_BIT = {
    16: GatherTile(128, 32, 4, 4),
    32: GatherTile(64, 32, 4, 4),
    64: GatherTile(64, 32, 4, 3),
    128: GatherTile(64, 32, 4, 3),
}
SAMPLE_16_BIT = {
    16: SampleTile(8, 64, 4, 3, False),
    32: SampleTile(4, 64, 4, 3, False),
    64: SampleTile(2, 64, 4, 3, False),
    128: SampleTile(1, 64, 8, 3, False),
}
SAMPLE_32_BIT = {side: replace(tile, tokens=32) for side, tile in SAMPLE_16_BIT.items()}


def has_group_mma(capability: Shape) -> bool:
    """Whether tensor cores read both operands from shared memory (Hopper, data-center Blackwell) or from registers."""
    return capability[0] in (9, 10)


def gather_tile(capability: Shape, side: int, dtype: torch.dtype, tokens: int) -> GatherTile:
    """The tile of `dds` on a GPU of compute `capability` `(major, minor)`."""
    tile = (GATHER_32_BIT if dtype == torch.float32 else GATHER_16_BIT)[side]
    if tokens <= FEW_TOKENS:
        return replace(tile, tokens=64, warps=4)
    if tokens >= MANY_TOKENS and side == 64 and dtype != torch.float32 and has_group_mma(capability):
        return replace(tile, tokens=256, warps=8)
    return tile


def sample_tile(capability: Shape, side: int, dtype: torch.dtype) -> SampleTile:
    """The tile of `sdd` on a GPU of compute `capability` `(major, minor)`."""
    if dtype == torch.float32:
        return SAMPLE_32_BIT[side]
    # Tensor cores that read shared memory transpose 16-bit operands on their way, and want 64 rows or more: so many
    # only the gathered columns have. For the others an operand is transposed in registers, better the small one.
    return replace(SAMPLE_16_BIT[side], columns_first=has_group_mma(capability))


def why_not(device: torch.device, dtype: torch.dtype, block_shape: Shape) -> str | None:
    """Why these operands cannot be served, or `None` if they can."""
    on_gpu = device.type == "cuda" and torch.version.hip is None
    if not on_gpu and not (_has_triton() and _is_interpreted()):
        return "runs on NVIDIA GPUs"
    if not _has_triton():
        return "needs Triton: pip install triton"
    if dtype not in DTYPES:
        return f"needs {', '.join(str(dtype).removeprefix('torch.') for dtype in DTYPES)}"
    if block_shape[0] != block_shape[1] or block_shape[0] not in SIDES:
        return f"needs blocks of {', '.join(f'{side} x {side}' for side in SIDES)}"
    if on_gpu and _capability(device) < (8, 0):
        return "needs compute capability 8.0 or higher"
    return None


def break_even(device: torch.device, block_shape: Shape) -> float:
    """Density above which the dense product is taken for faster: from a model of memory traffic, not measured."""
    return BREAK_EVEN[block_shape[0]]


def dds(
    input: torch.Tensor, values: torch.Tensor, layout: BlockLayout, bias: torch.Tensor | None, transposed: bool
) -> torch.Tensor:
    """`input @ W.T + bias`, or `input @ W` if `transposed` (the input gradient); see `reference.dds`."""
    return gather(input, values, layout.by_column if transposed else layout.by_row, bias)


def sdd(grad: torch.Tensor, input: torch.Tensor, layout: BlockLayout) -> torch.Tensor:
    """The active blocks of `grad.T @ input`; see `reference.sdd`."""
    side = layout.block_shape[0]
    group = sample_tile(_capability(grad.device), side, grad.dtype).group
    return sample(grad, input, layout.derived(group_order, group), side)


@dataclass(frozen=True)
class GroupOrder:
    """
    The active blocks row by row, in groups of blocks of one row.

    Args:
        order (`BlockOrder`): of the rows.
        rows (`torch.Tensor` of shape `(groups,)`, `torch.int32`): block row of each group; -1 for none, since the
            number of groups is the most that any topology of this `nnzb` needs.
        starts (`torch.Tensor` of shape `(groups,)`, `torch.int32`): first entry of each group.
    """

    order: BlockOrder
    rows: torch.Tensor
    starts: torch.Tensor


def group_order(layout: BlockLayout, group: int) -> GroupOrder:
    """The active blocks row by row, in groups of up to `group` blocks."""
    order, nnzb, lines = layout.by_row, layout.nnzb, layout.grid[0]
    counts = (order.offsets.diff() + (group - 1)) // group
    ends = counts.cumsum(0, dtype=torch.int32)
    # Whole groups, and at most one more in each row that has a block.
    number = torch.arange(nnzb // group + min(lines, nnzb), dtype=torch.int32, device=ends.device)
    row = torch.searchsorted(ends, number, right=True, out_int32=True)
    exists = row < lines
    row = row.clamp(max=lines - 1)
    starts = order.offsets[row] + (number - (ends - counts)[row]) * group
    return GroupOrder(order, torch.where(exists, row, -1), torch.where(exists, starts, 0))


def gather(
    input: torch.Tensor,
    values: torch.Tensor,
    order: BlockOrder,
    bias: torch.Tensor | None,
    tile: GatherTile | None = None,
) -> torch.Tensor:
    """`dds` by the kernel of that name, the order given; without a `tile` by that of the table."""
    from . import triton_kernels as kernels

    input, values = _readable(input), _readable(values)
    (tokens, in_width), side = input.shape, values.shape[1]
    lines = order.heaviest.numel()
    output = input.new_empty(tokens, lines * side)
    if not tokens:
        return output
    tile = tile or gather_tile(_capability(input.device), side, input.dtype, tokens)
    with torch.cuda.device_of(input):
        kernels.gather[(-(-tokens // tile.tokens) * lines,)](
            input,
            values,
            order.offsets,
            order.sources,
            order.slots,
            order.heaviest,
            output if bias is None else _readable(bias),  # an address that is not read
            output,
            tokens,
            lines,
            in_width,
            lines * side,
            SIDE=side,
            TOKENS=tile.tokens,
            DEPTH=tile.depth,
            TRANSPOSED=order.by_column,
            HAS_BIAS=bias is not None,
            PRECISION=_precision(),
            UPCAST=kernels.INTERPRETED,
            num_warps=tile.warps,
            num_stages=tile.stages,
            **FUSED,
        )
    return output


def sample(grad: torch.Tensor, input: torch.Tensor, order: GroupOrder, side: int) -> torch.Tensor:
    """`sdd` by the kernel of that name, the order given: blocks of `side` x `side`."""
    from . import triton_kernels as kernels

    grad, input = _readable(grad), _readable(input)
    nnzb, groups, (tokens, out_width) = order.order.slots.numel(), order.rows.numel(), grad.shape
    output = grad.new_empty(nnzb, side, side)
    tile = sample_tile(_capability(grad.device), side, grad.dtype)
    splits, split_tokens = split(tokens, groups, _processors(grad.device), tile.tokens)
    # One split writes its sums as they are wanted; several write them in full precision, to be added up in order.
    partial = output if splits == 1 else grad.new_empty(splits, nnzb, side, side, dtype=torch.float32)
    with torch.cuda.device_of(grad):
        kernels.sample[(groups, splits)](
            grad,
            input,
            order.rows,
            order.starts,
            order.order.offsets,
            order.order.sources,
            order.order.slots,
            partial,
            tokens,
            split_tokens,
            out_width,
            input.shape[1],
            output.numel(),
            SIDE=side,
            GROUP=tile.group,
            TOKENS=tile.tokens,
            COLUMNS_FIRST=tile.columns_first,
            PRECISION=_precision(),
            UPCAST=kernels.INTERPRETED,
            num_warps=tile.warps,
            num_stages=tile.stages,
            **FUSED,
        )
        if splits > 1:
            programs = -(-output.numel() // SUMMED_ENTRIES)
            kernels.sum_splits[(programs,)](partial, output, splits, output.numel(), ENTRIES=SUMMED_ENTRIES, **FUSED)
    return output


def split(tokens: int, groups: int, processors: int, tile_tokens: int) -> tuple[int, int]:
    """
    How many splits of how many tokens: enough programs for the GPU, whole tiles of tokens, and at least four of them,
    so that writing partial sums stays cheap beside making them.
    """
    wanted = -(-PROGRAMS_PER_PROCESSOR * processors // groups)
    tiles = -(-tokens // tile_tokens)
    splits = max(1, min(wanted, tiles // 4))
    split_tokens = -(-tiles // splits) * tile_tokens
    return max(1, -(-tokens // max(1, split_tokens))), split_tokens


def _readable(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` as the kernels read it: in rows, and with its own signs."""
    return tensor.resolve_neg().contiguous()


def _precision() -> str:
    # `allow_tf32` raises once a program has used this newer name for the same setting.
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _is_interpreted() -> bool:
    from .triton_kernels import INTERPRETED

    return INTERPRETED


@cache
def _capability(device: torch.device) -> Shape:
    """Compute capability, `(major, minor)`; where Triton interprets its kernels, one that takes no special path."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)


@cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return INTERPRETED_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count

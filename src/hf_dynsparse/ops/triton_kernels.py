"""
The GPU kernels, in Triton. Imported by `hf_dynsparse.ops.triton` when the first product runs: nothing else imports
Triton.

A line is a block row of the weight, or a block column in the transposed product; its entries are its active blocks.
Widths are numbers of features and multiples of `SIDE`, the side of a square block; matrices of tokens are contiguous.
"""

# mypy: disable-error-code="no-untyped-def"
# An annotation would choose how Triton compiles an argument.

import triton
import triton.language as tl


__all__ = ["INTERPRETED", "gather", "sample", "sum_splits"]

# Whether these kernels run on the CPU, in NumPy: decided, like the kernels, when this file is imported.
INTERPRETED: bool = triton.knobs.runtime.interpret


@triton.jit(do_not_specialize=["tokens", "lines"])
def gather(
    input,  # [tokens, in_width]
    values,  # [nnzb, SIDE, SIDE]
    offsets,  # [lines + 1]: first entry of each line
    sources,  # [nnzb]: which block of input features an entry reads
    slots,  # [nnzb]: its place in `values`
    heaviest,  # [lines]: lines with most entries first
    bias,  # [out_width]; not read unless HAS_BIAS
    output,  # [tokens, out_width]
    tokens,
    lines,
    in_width,
    out_width,
    SIDE: tl.constexpr,
    TOKENS: tl.constexpr,
    DEPTH: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One tile of TOKENS x one line of the output: the entries of the line, DEPTH input features at a time."""
    # Programs that run together share their tokens, so the input comes from memory once; the longest start first.
    program = tl.program_id(0)
    line = tl.load(heaviest + program % lines)
    first = tl.load(offsets + line)
    depth = (tl.load(offsets + line + 1) - first) * SIDE  # a line without entries: 0, and only the bias is written
    token = (program // lines) * TOKENS + tl.arange(0, TOKENS)
    known = token < tokens
    rows = input + token.to(tl.int64)[:, None] * in_width
    step = tl.arange(0, DEPTH)
    across = tl.arange(0, SIDE)
    RUN: tl.constexpr = min(SIDE, DEPTH)  # consecutive features of one block
    total = tl.zeros((TOKENS, SIDE), dtype=tl.float32)
    # Where to load from is itself loaded, one iteration ahead: known in time, the loads of the operands get as many
    # buffers as there are stages. Loaded where it is used, it leaves them one or two.
    source = tl.load(sources + first + step // SIDE, mask=step < depth, other=0)
    slot = tl.load(slots + first + step // SIDE, mask=step < depth, other=0)
    for start in range(0, depth, DEPTH):
        at = start + step
        inside = at < depth
        feature = tl.max_contiguous(tl.multiple_of(source * SIDE + at % SIDE, RUN), RUN)
        left = tl.load(rows + feature[None, :], mask=known[:, None] & inside[None, :], other=0.0)
        if TRANSPOSED:
            entry = slot * (SIDE * SIDE) + at % SIDE * SIDE
            right = tl.load(values + entry[:, None] + across[None, :], mask=inside[:, None], other=0.0)
        else:
            entry = tl.max_contiguous(tl.multiple_of(slot * (SIDE * SIDE) + at % SIDE, RUN), RUN)
            right = tl.load(values + entry[None, :] + across[:, None] * SIDE, mask=inside[None, :], other=0.0)
            right = tl.trans(right)
        following = at + DEPTH
        source = tl.load(sources + first + following // SIDE, mask=following < depth, other=0)
        slot = tl.load(slots + first + following // SIDE, mask=following < depth, other=0)
        if UPCAST:  # the interpreter would multiply the bit patterns of bfloat16
            left, right = left.to(tl.float32), right.to(tl.float32)
        total = tl.dot(left, right, total, input_precision=PRECISION)
    columns = line * SIDE + across
    if HAS_BIAS:
        total += tl.load(bias + columns).to(tl.float32)[None, :]
    place = output + token.to(tl.int64)[:, None] * out_width + columns[None, :]
    tl.store(place, total.to(output.dtype.element_ty), mask=known[:, None])


@triton.jit(do_not_specialize=["tokens", "split_tokens"])
def sample(
    grad,  # [tokens, out_width]
    input,  # [tokens, in_width]
    group_rows,  # [groups]: block row of each group of entries, -1 for none
    group_starts,  # [groups]: first entry of each group
    offsets,  # [block rows + 1]: first entry of each block row
    columns,  # [nnzb]: block column of each entry
    slots,  # [nnzb]: its place in `output`
    output,  # [splits, nnzb, SIDE, SIDE]
    tokens,
    split_tokens,  # tokens of one split
    out_width,
    in_width,
    split_entries,  # nnzb * SIDE * SIDE
    SIDE: tl.constexpr,
    GROUP: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS_FIRST: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """
    Up to GROUP entries of one block row, over the tokens of one split: one tile of `grad` serves them all. The tile of
    sums has the gathered columns first (COLUMNS_FIRST) or last, whichever the tensor cores of the chip load better.
    """
    group = tl.program_id(0)
    split = tl.program_id(1)
    row = tl.load(group_rows + group)
    if row >= 0:
        last = tl.load(offsets + row + 1)
        step = tl.arange(0, GROUP * SIDE)
        across = tl.arange(0, SIDE)
        entry = tl.load(group_starts + group) + step // SIDE
        inside = entry < last
        column = tl.load(columns + entry, mask=inside, other=0)
        slot = tl.load(slots + entry, mask=inside, other=0)
        feature = tl.max_contiguous(tl.multiple_of(column * SIDE + step % SIDE, SIDE), SIDE)
        out_feature = tl.max_contiguous(tl.multiple_of(row * SIDE + across, SIDE), SIDE)
        begin = split * split_tokens
        end = tl.minimum(begin + split_tokens, tokens)
        if COLUMNS_FIRST:
            total = tl.zeros((GROUP * SIDE, SIDE), dtype=tl.float32)
        else:
            total = tl.zeros((SIDE, GROUP * SIDE), dtype=tl.float32)
        for start in range(begin, end, TOKENS):
            token = start + tl.arange(0, TOKENS)
            known = token < end
            place = token.to(tl.int64)[:, None]
            right = tl.load(
                input + place * in_width + feature[None, :], mask=known[:, None] & inside[None, :], other=0.0
            )
            left = tl.load(grad + place * out_width + out_feature[None, :], mask=known[:, None], other=0.0)
            if UPCAST:
                left, right = left.to(tl.float32), right.to(tl.float32)
            if COLUMNS_FIRST:
                total = tl.dot(tl.trans(right), left, total, input_precision=PRECISION)
            else:
                total = tl.dot(tl.trans(left), right, total, input_precision=PRECISION)
        blocks = output + split.to(tl.int64) * split_entries
        if COLUMNS_FIRST:
            place = blocks + (slot * (SIDE * SIDE) + step % SIDE)[:, None] + (across * SIDE)[None, :]
            tl.store(place, total.to(output.dtype.element_ty), mask=inside[:, None])
        else:
            place = blocks + (slot * (SIDE * SIDE) + step % SIDE)[None, :] + (across * SIDE)[:, None]
            tl.store(place, total.to(output.dtype.element_ty), mask=inside[None, :])


@triton.jit(do_not_specialize=["splits"])
def sum_splits(
    partial,  # [splits, entries]
    output,  # [entries]
    splits,
    entries,
    ENTRIES: tl.constexpr,
):
    """The sum over splits of ENTRIES entries, first split first: the same bits every time."""
    place = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)
    known = place < entries
    total = tl.zeros((ENTRIES,), dtype=tl.float32)
    summand = partial + place
    for _ in range(splits):
        total += tl.load(summand, mask=known, other=0.0)
        summand += entries
    tl.store(output + place, total.to(output.dtype.element_ty), mask=known)

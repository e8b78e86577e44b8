"""
Plain PyTorch for large blocks: gather the features that the active blocks read, multiply, and write rows of blocks.

Block rows with the same number of active blocks form a group. Within a group the blocks of a row lie side by side, so
one batched product does the sums over them too: nothing is padded, added atomically or rounded twice. Results repeat
bit for bit. Tokens come in chunks that stay in the cache; no dense weight or gradient exists, not even in part.
"""

from dataclasses import dataclass

import torch

from ..blocks.layout import BlockLayout
from .reference import Shape


__all__ = ["break_even", "dds", "sdd", "why_not"]

# Below this the copies cost more than a dense product.
SMALLEST_SIDE = 16

# Tokens multiplied at a time, and bytes that are gathered at once: what a core's cache holds, what fills a GPU.
CPU_CHUNK = 256, 1 << 20
DEVICE_CHUNK = 8192, 1 << 26


@dataclass(frozen=True)
class _Group:
    """
    Lines (block rows or block columns) with the same number of active blocks: all `torch.int64`.

    Args:
        count (`int`): active blocks of a line.
        lines (`torch.Tensor` of shape `(lines,)`): which ones.
        sources (`torch.Tensor` of shape `(lines * count,)`): the block of features that each active block reads.
        slots (`torch.Tensor` of shape `(lines * count,)`): its place in `values`.
    """

    count: int
    lines: torch.Tensor
    sources: torch.Tensor
    slots: torch.Tensor


def why_not(device: torch.device, dtype: torch.dtype, block_shape: Shape) -> str | None:
    """Why these operands cannot be served, or `None` if they can."""
    if min(block_shape) < SMALLEST_SIDE:
        return f"needs blocks of at least {SMALLEST_SIDE} x {SMALLEST_SIDE}"
    return None


def break_even(device: torch.device, block_shape: Shape) -> float:
    """
    Density above which the dense product is taken for faster: measured at 768 x 768, 1,024 tokens, on a CPU.
    """
    if device.type != "cpu":
        return 0.0  # not measured
    side = min(block_shape)
    return 0.65 if side >= 64 else 0.5 if side >= 32 else 0.4


def dds(
    input: torch.Tensor, values: torch.Tensor, layout: BlockLayout, bias: torch.Tensor | None, transposed: bool
) -> torch.Tensor:
    """`input @ W.T + bias`, or `input @ W` if `transposed` (the input gradient); see `reference.dds`."""
    width, side, across = layout.shape[transposed], layout.block_shape[transposed], layout.block_shape[not transposed]
    tokens, lines = input.shape[0], width // side
    step, groups = _chunks(input, layout, transposed)
    blocks = values if transposed else values.transpose(1, 2)
    weights = [blocks[group.slots].reshape(group.lines.numel(), group.count * across, side) for group in groups]
    # The groups write their lines one after the other: where does each line of the output come from?
    origin = torch.cat([group.lines for group in groups]).argsort()
    features = input.reshape(tokens, -1, across) if tokens else input
    output = input.new_empty(tokens, width)
    for first in range(0, tokens, step):
        chunk = features[first : first + step]
        products = input.new_empty(lines, chunk.shape[0], side)
        start = 0
        for group, weight in zip(groups, weights, strict=True):
            stop = start + group.lines.numel()
            torch.bmm(_gather(chunk, group), weight, out=products[start:stop])
            start = stop
        ordered = products.index_select(0, origin).transpose(0, 1)  # [tokens, lines, side]
        written = output[first : first + step].view(ordered.shape)
        if bias is None:
            written.copy_(ordered)
        else:
            torch.add(ordered, bias.view(lines, side), out=written)
    return output


def sdd(grad: torch.Tensor, input: torch.Tensor, layout: BlockLayout) -> torch.Tensor:
    """The active blocks of `grad.T @ input`; see `reference.sdd`."""
    (rows, columns), tokens = layout.block_shape, input.shape[0]
    step, groups = _chunks(input, layout, False)
    # Sums over chunks are at least float32: low precision is rounded once more, no matter how many there are.
    dtype = torch.promote_types(grad.dtype, torch.float32)
    sums = [grad.new_zeros(group.lines.numel(), rows, group.count * columns, dtype=dtype) for group in groups]
    features = input.reshape(tokens, -1, columns) if tokens else input
    grads = grad.reshape(tokens, -1, rows) if tokens else grad
    for first in range(0, tokens, step):
        chunk, grad_chunk = features[first : first + step], grads[first : first + step]
        for group, total in zip(groups, sums, strict=True):
            of_lines = grad_chunk.index_select(1, group.lines).permute(1, 2, 0)  # [lines, rows, tokens]
            total += torch.bmm(of_lines, _gather(chunk, group))
    output = input.new_empty(layout.nnzb, rows, columns)
    for group, total in zip(groups, sums, strict=True):
        split = total.view(group.lines.numel(), rows, group.count, columns).transpose(1, 2)
        output[group.slots] = split.flatten(0, 1).to(output.dtype)
    return output


def _chunks(features: torch.Tensor, layout: BlockLayout, by_column: bool) -> tuple[int, list[_Group]]:
    """How many tokens to multiply at a time, and the groups to do it by."""
    step, limit = CPU_CHUNK if features.device.type == "cpu" else DEVICE_CHUNK
    # Of the layer alone, not of the number of tokens: the groups are kept until the topology changes.
    entries = limit // (step * layout.block_shape[not by_column] * features.element_size())
    return step, layout.derived(_groups, by_column, entries)


def _groups(layout: BlockLayout, by_column: bool, limit: int) -> list[_Group]:
    """Groups of at most `limit` blocks, or of one line."""
    order = layout.by_column if by_column else layout.by_row
    offsets, slots, sources = order.offsets.long(), order.slots.long(), order.sources.long()
    counts = offsets.diff()
    groups = []
    for count in counts.unique().tolist():
        for lines in (counts == count).nonzero().squeeze(1).split(max(1, limit // max(1, count))):
            entries = (offsets[lines, None] + torch.arange(count, device=lines.device)).flatten()
            groups.append(_Group(count, lines, sources[entries], slots[entries]))
    return groups


def _gather(features: torch.Tensor, group: _Group) -> torch.Tensor:
    """What the lines read of `features` `(tokens, blocks, across)`: `(lines, tokens, count * across)`."""
    tokens, _, across = features.shape
    read = features.index_select(1, group.sources)
    # The batch is a stride: the library multiplies what lies there without another copy.
    return read.view(tokens, group.lines.numel(), group.count * across).transpose(0, 1)

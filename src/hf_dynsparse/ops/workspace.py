"""
Plain PyTorch for everything else: one transient dense weight, at the time of the dense layer.

The active blocks are scattered into a dense matrix for the time of one product of the library. The weight gradient is
computed into the same memory, and its active blocks are taken. That memory is one buffer for all layers of a dtype, as
large as the largest of them. Bit-reproducible wherever the library's product is.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock

import torch
from torch.nn.functional import linear

from ..blocks.layout import BlockLayout
from .reference import Shape, why_not


__all__ = ["dds", "release_workspace", "sdd", "why_not"]


@dataclass
class _Workspace:
    """A buffer and the right to use it."""

    lock: Lock = field(default_factory=Lock)
    buffer: torch.Tensor | None = None


# By device, stream and dtype. Forward and backward passes run on different threads but on one stream: the lock orders
# what threads submit (and what the CPU does), the stream orders what a GPU does with it.
_workspaces: dict[tuple[torch.device, int, torch.dtype], _Workspace] = {}


def release_workspace() -> None:
    """Free the buffers; the next product that wants one makes it anew."""
    _workspaces.clear()


def dds(
    input: torch.Tensor, values: torch.Tensor, layout: BlockLayout, bias: torch.Tensor | None, transposed: bool
) -> torch.Tensor:
    """`input @ W.T + bias`, or `input @ W` if `transposed` (the input gradient); see `reference.dds`."""
    with _dense(input, layout.shape) as weight:
        weight.zero_()
        position, columns = _positions(layout), layout.block_shape[1]
        if columns == 1:
            weight.view(-1).scatter_(0, position, values.reshape(-1))  # a third of the time of the line below
        else:  # rows of blocks, [..., columns]
            weight.view(-1, columns).index_copy_(0, position, values.reshape(-1, columns))
        return linear(input, weight.T if transposed else weight, bias)


def sdd(grad: torch.Tensor, input: torch.Tensor, layout: BlockLayout) -> torch.Tensor:
    """The active blocks of `grad.T @ input`; see `reference.sdd`."""
    with _dense(input, layout.shape) as gradient:
        torch.mm(grad.T, input, out=gradient)
        columns = layout.block_shape[1]
        lines = gradient.view(-1) if columns == 1 else gradient.view(-1, columns)
        return lines.index_select(0, _positions(layout)).view(-1, *layout.block_shape)


@contextmanager
def _dense(like: torch.Tensor, shape: Shape) -> Iterator[torch.Tensor]:
    """The workspace as a matrix of `shape`, holding anything, for one user at a time."""
    stream = torch.cuda.current_stream(like.device).cuda_stream if like.device.type == "cuda" else 0
    workspace = _workspaces.setdefault((like.device, stream, like.dtype), _Workspace())
    entries = shape[0] * shape[1]
    with workspace.lock:
        if workspace.buffer is None or workspace.buffer.numel() < entries:
            workspace.buffer = None  # free the smaller one first
            # A buffer that inference made would be of no use to training.
            with torch.inference_mode(False):
                workspace.buffer = torch.empty(entries, dtype=like.dtype, device=like.device)
        yield workspace.buffer[:entries].view(shape)


def _positions(layout: BlockLayout) -> torch.Tensor:
    """
    Where each row of each block lies in the dense matrix, counted in rows of a block: integers of shape
    `(nnzb * rows,)`. Single entries are named by the index itself; another copy would be as large as the values.
    """
    return layout.block_index if layout.block_shape == (1, 1) else layout.derived(_derive_positions)


def _derive_positions(layout: BlockLayout) -> torch.Tensor:
    rows, block_columns = layout.block_shape[0], layout.grid[1]
    first = layout.rows * (rows * block_columns) + layout.columns  # [nnzb]
    return (first[:, None] + torch.arange(rows, device=first.device) * block_columns).flatten()

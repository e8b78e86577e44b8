"""How many blocks each layer keeps, by the errors that fewer make."""

from collections.abc import Mapping
from itertools import pairwise

import torch

from .least_squares import Objective
from .selection import prune_path


Curve = Mapping[int, float]  # active blocks of a layer -> share of the variance of its outputs that is lost

LEVELS = (2.0, 1.4, 1.0, 0.7, 0.5)  # what is tried, beside all blocks: shares of what the distribution gives a layer


def error_curve(
    objective: Objective, weight: torch.Tensor, nnzb: int, block_shape: tuple[int, int], selection: str
) -> Curve:
    """The errors of one layer with about half, as many as, and up to twice the `nnzb` blocks that it is to keep."""
    total = weight.numel() // (block_shape[0] * block_shape[1])
    counts = sorted({total, *(min(total, max(1, round(level * nnzb))) for level in LEVELS)}, reverse=True)
    # Of a weight that is fitted as it stands, tr(W H W') = tr(W T'): what it explains.
    explained = [
        float((fitted * objective.target).sum())
        for fitted in prune_path(objective, weight, counts, block_shape, selection)
    ]
    return {count: 1.0 - part / max(explained[0], 1e-300) for count, part in zip(counts, explained, strict=True)}


def share_out(curves: Mapping[str, Curve], sizes: Mapping[str, int], entries: int) -> dict[str, int]:
    """
    The numbers of blocks that make the sum of all errors least, if a curve is straight from one number that was tried
    to the next.

    Args:
        curves (`Mapping[str, Mapping[int, float]]`): by layer.
        sizes (`Mapping[str, int]`): entries of a block, by layer.
        entries (`int`): those that all layers have together, at most.
    """
    nnzb = {name: min(curve) for name, curve in curves.items()}
    entries -= sum(nnzb[name] * sizes[name] for name in curves)
    gains = []
    for name, curve in curves.items():
        gain = float("inf")
        for few, many in pairwise(sorted(curve)):
            # Never more than what the blocks before were worth: these come first.
            gain = min(gain, (curve[few] - curve[many]) / ((many - few) * sizes[name]))
            gains.append((gain, name, many - few))
    for _, name, blocks in sorted(gains, key=lambda item: -item[0]):
        taken = min(blocks, entries // sizes[name])
        nnzb[name] += taken
        entries -= taken * sizes[name]
    return nnzb

"""Blocks of a layer chosen together, by alternating between a weight that fits and one that is block-sparse."""

import torch

from ..blocks.dense import from_blocks, to_blocks
from .least_squares import Objective


ITERATIONS = 60
PENALTY, GROWTH = 0.1, 1.08  # times a hundred from the first iteration to the last


class AlternatingSelection:
    """
    The alternating direction method of multipliers for the objective with few blocks (ALPS, arXiv:2406.07831, section
    3.1; here for blocks, with a penalty that grows evenly). Inputs are scaled to variance one first. One
    decomposition of `H` serves every penalty and every number of blocks.

    Args:
        objective (`Objective`): what the weight is to make least.
    """

    def __init__(self, objective: Objective) -> None:
        scale = objective.hessian.diagonal().rsqrt()
        values, vectors = torch.linalg.eigh(objective.hessian * scale * scale[:, None])
        # Only which blocks stay is taken from here: float32 is fine enough, and twice as fast.
        self._values, self._vectors = values.float().clamp(min=torch.finfo(torch.float32).eps), vectors.float()
        self._target = (objective.target * scale).float() @ self._vectors

    def choose(self, count: int, block_shape: tuple[int, int]) -> torch.Tensor:
        """The `count` blocks to keep, as `torch.bool` of shape `(block_rows, block_columns)`."""
        fitted = (self._target / self._values) @ self._vectors.T
        duals, penalty = torch.zeros_like(fitted), PENALTY
        for _ in range(ITERATIONS):
            blocks = to_blocks(fitted + duals, block_shape)  # [block_rows, block_columns, height, width]
            sparse = from_blocks(blocks * _largest(blocks, count)[..., None, None])
            duals = (duals + fitted - sparse) / GROWTH  # scaled duals are those divided by the penalty
            penalty *= GROWTH
            pulled = self._target + penalty * ((sparse - duals) @ self._vectors)
            fitted = (pulled / (self._values + penalty)) @ self._vectors.T
        return _largest(to_blocks(fitted + duals, block_shape), count)


def _largest(blocks: torch.Tensor, count: int) -> torch.Tensor:
    """Those with the largest sums of squares."""
    return highest(blocks.square().sum((2, 3)), count)


def highest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Where the `count` highest scores are, as `torch.bool`; ties go to the lower id."""
    kept = scores.flatten().sort(descending=True, stable=True).indices[:count]
    return torch.zeros_like(scores, dtype=torch.bool).flatten().index_fill(0, kept, True).view_as(scores)

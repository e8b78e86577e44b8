"""Kept weights that bring the outputs of a layer nearest to those of the dense one, and what each block is worth."""

from typing import NamedTuple

import torch

from ..blocks.dense import to_blocks
from .statistics import Statistics


# Inputs whose variance is a smaller share of their mean square are taken for ones that vary so much: behind a layer
# that has lost what made them differ, products in float32 leave rounding of a variance, and that may be negative.
HARDLY_VARIES = 0.01


class Objective(NamedTuple):
    """
    The mean square error of the outputs of a layer, but for a constant, as `tr(W H W') - 2 tr(W T')` of its weight.

    Attributes:
        hessian (`torch.Tensor` of shape `(in_features, in_features)`, `torch.float64`): `H`.
        target (`torch.Tensor` of shape `(out_features, in_features)`, `torch.float64`): `T`.
    """

    hessian: torch.Tensor
    target: torch.Tensor


def objective_of(
    statistics: Statistics, weight: torch.Tensor, has_bias: bool, ridge: float, dense_share: float
) -> Objective:
    """
    Of a layer that is to return for its own inputs `x` what its dense `weight` `V` does for a mixture of `x` and the
    inputs `y` of the dense model, `z = a y + (1 - a) x`: least squares with a ridge towards `V`. A bias takes up the
    means, so that covariances remain: `H = Cov[x] + r`, `T = V (Cov[z, x] + r)`.

    Args:
        ridge (`float`): `r` as a share of the mean of the diagonal of `Cov[x]`, which counts as a hundredth of that of
            the second moment at least.
        dense_share (`float`): `a`.
    """
    hessian, cross = statistics.gram / statistics.count, statistics.cross / statistics.count
    least = HARDLY_VARIES * hessian.diagonal().mean()
    if has_bias:
        mean, dense_mean = statistics.total / statistics.count, statistics.dense_total / statistics.count
        hessian, cross = hessian - mean.outer(mean), cross - dense_mean.outer(mean)
    mixture = torch.lerp(hessian, cross, dense_share)
    # Never zero: inputs that are constant would leave nothing to solve.
    pull = ridge * torch.maximum(hessian.diagonal().mean(), least) + torch.finfo(hessian.dtype).eps
    target = weight.double() @ mixture + pull * weight.double()
    return Objective(hessian + pull * torch.eye(len(hessian)).to(hessian), target)


def solve(objective: Objective, active: torch.Tensor, block_shape: tuple[int, int]) -> torch.Tensor:
    """
    The weight `(out_features, in_features)`, zero outside of the `active` blocks, that makes the objective least.

    Args:
        active (`torch.Tensor` of shape `(block_rows, block_columns)`, `torch.bool`).
    """
    return _solve(objective, active, block_shape, None)


def solve_with_costs(
    objective: Objective, active: torch.Tensor, block_shape: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    As [`solve`], and by how much the objective grows when one active block is removed and the others of its block row
    are solved for anew: `tr(w (inv(H)_bb)^-1 w')` for block `w`, where `inv(H)` is that of the active inputs
    (arXiv:2203.07259, section 3.2; for rows of blocks instead of one). Of shape `(block_rows, block_columns)`; zero
    where no block is active.
    """
    costs = torch.zeros(active.shape, dtype=torch.float64, device=active.device)
    return _solve(objective, active, block_shape, costs), costs


def _solve(
    objective: Objective, active: torch.Tensor, block_shape: tuple[int, int], costs: torch.Tensor | None
) -> torch.Tensor:
    (height, width), weight = block_shape, torch.zeros_like(objective.target)
    # Block rows with the same active columns share one factorisation.
    patterns, pattern_of = active.unique(dim=0, return_inverse=True)
    for number, pattern in enumerate(patterns):
        block_columns, block_rows = pattern.nonzero().squeeze(1), (pattern_of == number).nonzero().squeeze(1)
        if not len(block_columns):
            continue
        columns, rows = _entries(block_columns, width), _entries(block_rows, height)[:, None]
        factor = torch.linalg.cholesky(objective.hessian[columns[:, None], columns])
        solution = torch.cholesky_solve(objective.target[rows, columns].T, factor).T
        weight[rows, columns] = solution
        if costs is not None:
            inverse = to_blocks(torch.cholesky_inverse(factor), (width, width)).diagonal().permute(2, 0, 1)
            blocks = to_blocks(solution.contiguous(), block_shape)  # [block_rows, block_columns, height, width]
            costs[block_rows[:, None], block_columns] = (blocks @ inverse.inverse() * blocks).sum((2, 3))
    return weight


def _entries(blocks: torch.Tensor, side: int) -> torch.Tensor:
    """The rows, or columns, of some block rows, or block columns."""
    return (blocks[:, None] * side + torch.arange(side, device=blocks.device)).flatten()

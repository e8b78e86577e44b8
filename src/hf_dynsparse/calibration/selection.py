"""Which blocks of a layer stay."""

from collections.abc import Callable, Iterable, Iterator
from math import prod

import torch

from ..blocks.dense import to_blocks
from .admm import AlternatingSelection, highest
from .least_squares import Objective, solve, solve_with_costs


Score = Callable[[Objective, torch.Tensor, torch.Tensor, tuple[int, int]], torch.Tensor]


def magnitude(
    objective: Objective, weight: torch.Tensor, active: torch.Tensor, block_shape: tuple[int, int]
) -> torch.Tensor:
    """The sum of `|w|` over a block."""
    return to_blocks(weight.abs(), block_shape).sum((2, 3))


def activation(
    objective: Objective, weight: torch.Tensor, active: torch.Tensor, block_shape: tuple[int, int]
) -> torch.Tensor:
    """The sum of `w² H_ii` over a block: its part in the outputs, if inputs were uncorrelated (arXiv:2306.11695)."""
    return to_blocks(weight.square() * objective.hessian.diagonal(), block_shape).sum((2, 3))


def surgeon(
    objective: Objective, weight: torch.Tensor, active: torch.Tensor, block_shape: tuple[int, int]
) -> torch.Tensor:
    """What its removal costs, when the others of its block row are fitted anew; see [`solve_with_costs`]."""
    return solve_with_costs(objective, active, block_shape)[1]


# (objective, weight, active blocks, block shape) -> scores of shape (block_rows, block_columns).
SCORES: dict[str, Score] = {"magnitude": magnitude, "activation": activation, "surgeon": surgeon}
TOGETHER = "admm"
SELECTIONS = (TOGETHER, *SCORES)


def prune_to(
    objective: Objective, weight: torch.Tensor, count: int, block_shape: tuple[int, int], selection: str, steps: int
) -> torch.Tensor:
    """
    Prune a dense weight of shape `(out_features, in_features)` to `count` blocks; by a score in `steps` equal ratios.

    Returns:
        `torch.Tensor`: the weight, zero where no block is active, fitted to the objective.
    """
    blocks = weight.numel() // prod(block_shape)
    ways = [max(count, round(blocks * (count / blocks) ** (step / steps))) for step in range(1, steps + 1)]
    *_, fitted = prune_path(objective, weight, ways if selection in SCORES else [count], block_shape, selection)
    return fitted


def prune_path(
    objective: Objective, weight: torch.Tensor, counts: Iterable[int], block_shape: tuple[int, int], selection: str
) -> Iterator[torch.Tensor]:
    """
    As [`prune_to`], for several numbers of blocks.

    Args:
        counts (`Iterable[int]`): active blocks, fewer and fewer: by a score, what is gone does not come back. Ties go
            to the lower id.
        selection (`str`): one of `SELECTIONS`.

    Yields:
        `torch.Tensor`: for each number the weight.
    """
    if selection == TOGETHER:
        together = AlternatingSelection(objective)
        for count in counts:
            yield solve(objective, together.choose(count, block_shape), block_shape)
        return
    weight = weight.double()
    active = torch.ones(to_blocks(weight, block_shape).shape[:2], dtype=torch.bool, device=weight.device)
    for count in counts:
        scores = SCORES[selection](objective, weight, active, block_shape).masked_fill(~active, -1.0)
        active = highest(scores, count)
        weight = solve(objective, active, block_shape)
        yield weight

"""Scores of blocks: the lowest are pruned, the highest are regrown. One small function each, in one table."""

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class BlockStatistics:
    """
    What a score may look at, for a set of `count` blocks. A field is filled only if the score declares that it needs
    it.

    Args:
        count (`int`): number of blocks.
        generator (`torch.Generator`): on the CPU, the same on every rank.
        device (`torch.device`): where the score must live.
        values (`torch.Tensor` of shape `(count, rows, columns)`): weights of active blocks.
        gradient (`torch.Tensor` of shape `(count, rows, columns)`): dense gradient, summed over micro-batches and
            ranks.
        ever_active (`torch.Tensor` of shape `(count,)`, `torch.bool`): which blocks were active at any time so far.
    """

    count: int
    generator: torch.Generator
    device: torch.device
    values: torch.Tensor | None = None
    gradient: torch.Tensor | None = None
    ever_active: torch.Tensor | None = None


@dataclass(frozen=True)
class Score:
    """
    A score and the statistics it needs.

    Args:
        function (`Callable`): `BlockStatistics -> torch.Tensor` of shape `(count,)`.
        needs (`frozenset[str]`): fields of `BlockStatistics`, of "values", "gradient" and "ever_active".
    """

    function: Callable[[BlockStatistics], torch.Tensor]
    needs: frozenset[str] = frozenset()


def l1(blocks: BlockStatistics) -> torch.Tensor:
    """Sum of magnitudes: the paper's default (arXiv:2108.06277, section 3)."""
    return _given(blocks.values).abs().sum((1, 2), dtype=torch.float32)


def l2(blocks: BlockStatistics) -> torch.Tensor:
    """Euclidean norm."""
    return _given(blocks.values).float().square().sum((1, 2)).sqrt()


def linf(blocks: BlockStatistics) -> torch.Tensor:
    """Largest magnitude."""
    return _given(blocks.values).float().abs().amax((1, 2))


def gradient(blocks: BlockStatistics) -> torch.Tensor:
    """L1 norm of the dense gradient: RigL (arXiv:1911.11134), by blocks."""
    return _given(blocks.gradient).float().abs().sum((1, 2))


def random(blocks: BlockStatistics) -> torch.Tensor:
    """Uniform: each set of blocks is equally likely (SET, and the paper's regrow rule)."""
    return torch.rand(blocks.count, generator=blocks.generator).to(blocks.device)


def unfired(blocks: BlockStatistics) -> torch.Tensor:
    """Uniform among positions that were never active, then among the others (arXiv:2102.02887)."""
    return random(blocks) - _given(blocks.ever_active).float()


def _given(field: torch.Tensor | None) -> torch.Tensor:
    if field is None:
        raise ValueError("A score used a statistic that it does not declare. Add it to `needs` in `SCORES`.")
    return field


SCORES: dict[str, Score] = {
    "l1": Score(l1, frozenset({"values"})),
    "l2": Score(l2, frozenset({"values"})),
    "linf": Score(linf, frozenset({"values"})),
    "random": Score(random),
    "gradient": Score(gradient, frozenset({"gradient"})),
    "unfired": Score(unfired, frozenset({"ever_active"})),
}

# An inactive block has no values to look at; a pruned one was active, so its history says nothing.
PRUNE_SCORES = tuple(name for name, score in SCORES.items() if score.needs <= {"values", "gradient"})
REGROW_RULES = tuple(name for name, score in SCORES.items() if "values" not in score.needs)


def resolve_score(name: str, argument: str, allowed: tuple[str, ...]) -> Score:
    """
    Turn the value of `argument` ("prune_score" or "regrow_rule") into a score.

    Raises:
        ValueError: if the name is not among `allowed`.
    """
    if name not in allowed:
        raise ValueError(f"`{argument}` must be one of {', '.join(allowed)}. Got {name!r}.")
    return SCORES[name]

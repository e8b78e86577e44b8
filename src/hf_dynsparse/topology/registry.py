"""Scores, regrow rules and methods from outside of the package: `register_score` and its like."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import Any

import torch

from .context import UpdateContext
from .methods import METHODS, Method
from .records import RECORDS
from .scores import OBSERVED, OF_PRUNING, OF_REGROWING, SCORES, BlockStatistics, Score
from .settings import TopologyOptions
from .update import Replacement


def register_score(name: str, function: Callable[[BlockStatistics], torch.Tensor], needs: Iterable[str] = ()) -> None:
    """
    Make a score of your own a value of `prune_score`: the blocks of the lowest are pruned. One that needs no values is
    a regrow rule too.

    Args:
        function (`Callable[[BlockStatistics], torch.Tensor]`): gives the scores, of shape `(count,)`.
        needs (`Iterable[str]`): the fields of [`BlockStatistics`] that it looks at: "values", "gradient",
            "second_moment", "newborn".

    Raises:
        ValueError: for a name that is taken, or a field that an active block does not have.

    Example:
        ```python
        >>> register_score("mean_square", lambda blocks: blocks.values.square().mean((1, 2)), needs=["values"])
        ```
    """
    _add(SCORES, name, Score(function, _checked(name, needs, OF_PRUNING, "A prune score")))


def register_regrow_rule(
    name: str, function: Callable[[BlockStatistics], torch.Tensor], needs: Iterable[str] = ()
) -> None:
    """
    Make a score of your own a value of `regrow_rule`: the free positions of the highest are regrown.

    Args:
        function (`Callable[[BlockStatistics], torch.Tensor]`): gives the scores of all positions, of shape `(count,)`.
        needs (`Iterable[str]`): the fields of [`BlockStatistics`] that it looks at: "gradient", "momentum",
            "input_scale", "output_scale", "ever_active", "occupied", "barred".

    Raises:
        ValueError: for a name that is taken, or a field that a free position does not have.
    """
    _add(SCORES, name, Score(function, _checked(name, needs, OF_REGROWING, "A regrow rule")))


def register_method(
    name: str,
    settings: Mapping[str, Any] | None = None,
    *,
    source: str = "",
    targets: Callable[[UpdateContext], dict[str, int]] | None = None,
    choose: Callable[[UpdateContext, str, int], Replacement] | None = None,
    needs: Iterable[str] = (),
) -> None:
    """
    Make a method of your own a value of `method`: a preset of topology options, and at most two functions where it
    decides otherwise; see [`Method`].

    Raises:
        ValueError: for a name that is taken, an option that does not exist, or a statistic that nobody collects.
    """
    # The others are the same for all methods.
    options = {option.name for option in fields(TopologyOptions)} - {"method", "regrow_std", "seed"}
    settings = dict(settings or {})
    if unknown := sorted(settings.keys() - options):
        raise ValueError(
            f"A method sets topology options: {', '.join(sorted(options))}. Got {', '.join(unknown)} for {name!r}. "
            "Leave it out, or correct the name."
        )
    known = OBSERVED | RECORDS.keys() | {"second_moment"}
    _add(METHODS, name, Method(source, settings, targets, choose, _checked(name, needs, known, "A method")))


def _checked(name: str, needs: Iterable[str], known: Iterable[str], what: str) -> frozenset[str]:
    needs = frozenset([needs] if isinstance(needs, str) else needs)
    if unknown := sorted(needs - frozenset(known)):
        raise ValueError(
            f"{what} may need {', '.join(sorted(known))}. Got {', '.join(unknown)} for {name!r}. Leave it out, or "
            "correct the name."
        )
    return needs


def _add(table: dict[str, Any], name: str, row: Any) -> None:
    if name in table:
        raise ValueError(
            f"The name of a score, regrow rule or method must be new. Got {name!r}, which is taken. Choose another."
        )
    table[name] = row

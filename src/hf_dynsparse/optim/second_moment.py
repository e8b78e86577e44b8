"""Adam's running mean of the squared gradient, for scores: a diagonal of the Fisher information that costs nothing."""

import copy
import math
from collections import defaultdict
from typing import Any

import torch
from torch import nn

from ..nn.shards import local_rows
from .moments import group_of, unwrapped


KEY = "exp_avg_sq"  # what Adam and its kin call it


def bias_correction(beta: float, age: torch.Tensor) -> torch.Tensor:
    """`1 - beta**age`: what a mean over `age` steps that began at zero has to be divided by. Accurate near 0."""
    return torch.expm1(age * (math.log(beta) if beta else -math.inf)).neg_()


def second_moment(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter, ages: torch.Tensor | None = None
) -> torch.Tensor:
    """
    The second moment of the rows of `parameter` that lie on this rank, in float32, each divided by `1 - beta2**a` for
    the `a` steps that it has run: as long as its block is active. Zero before the first step.

    Args:
        ages (`torch.Tensor` of shape `(rows,)`, *optional*): steps since each block was activated; infinite for those
            that are as old as the optimiser. Default: all are. [`BlockAdamW`] has its own.

    Raises:
        ValueError: see `check_second_moment`.
    """
    check_second_moment(optimizer, parameter)
    state = optimizer.state.get(parameter, {})
    if not state:
        return torch.zeros_like(local_rows(parameter)[0], dtype=torch.float32)
    moment, first = local_rows(state[KEY])
    if "age" in state:
        age = local_rows(state["age"])[0]
    else:
        age = torch.as_tensor(state.get("step", math.inf), dtype=torch.float32, device=moment.device)
        if ages is not None:
            age = torch.minimum(age, ages[first : first + len(moment), None, None].to(age))  # [rows, 1, 1]
    return moment.float() / bias_correction(group_of(optimizer, parameter)["betas"][1], age.clamp(min=1))


def check_second_moment(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, name: str = "values") -> None:
    """
    Raises:
        ValueError: if `optimizer` will keep no second moment of every entry of `parameter`, called `name`.
    """
    moment = (optimizer.state.get(parameter) or _state_after_a_step(optimizer, parameter)).get(KEY)
    betas = group_of(optimizer, parameter).get("betas", ())
    if len(betas) < 2 or not torch.is_tensor(moment) or moment.shape[1:] != parameter.shape[1:]:
        raise ValueError(
            f"A score of the second moment needs an optimiser that keeps one of every entry: `{KEY}`, by `betas`. Got "
            f"{type(unwrapped(optimizer)).__name__} for `{name}`. Use AdamW (`optim='adamw_torch'` or "
            "'adamw_torch_fused', `BlockAdamW`), or prune by another score, such as 'weight_gradient'."
        )


def _state_after_a_step(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Any]:
    """What `optimizer` will keep of `parameter`: a copy of it takes a step on a row of its own."""
    row = nn.Parameter(torch.zeros(1, *parameter.shape[1:], dtype=parameter.dtype, device=parameter.device))
    row.grad = torch.ones_like(row)
    trial = copy.copy(unwrapped(optimizer))
    trial.state, trial.param_groups = defaultdict(dict), [{**group_of(optimizer, parameter), "params": [row]}]
    try:
        trial.step()
    except Exception:  # whoever cannot step as a copy has state of another kind, in 8 bits or on a GPU
        return {}
    return trial.state[row]

"""What sparse training asks of the state of an optimiser: clean moments for new blocks."""

from typing import Any

import torch
from torch import nn

from ..nn.shards import write_rows_


# Rows that an optimiser does not begin at zero, and the setting of the parameter's group that they begin at: the step
# sizes of Rprop, the sums of Adagrad.
FIRST_VALUES = {"step_size": "lr", "sum": "initial_accumulator_value"}


def check_optimizer_state(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> list[torch.Tensor]:
    """
    The moments of a sparse layer's `values`: every state tensor with one row per slot.

    Raises:
        TypeError: if some state is neither such a tensor nor a single number, so that its rows cannot be cleared.
        ValueError: see `check_state_size`.
    """
    return [moment for moment, _ in _moments(optimizer, parameter)]


def check_state_size(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, name: str = "values") -> None:
    """
    Check that the moments of `parameter`, called `name`, have its shape; fused optimisers do not, and read elsewhere.

    Raises:
        ValueError: if one has another number of rows.
    """
    for key, state in optimizer.state.get(parameter, {}).items():
        if torch.is_tensor(state) and state.dim() == parameter.dim() and len(state) != len(parameter):
            raise ValueError(
                f"Optimiser state must have one row for each block of the layer that it belongs to. Got {key!r} of "
                f"shape {tuple(state.shape)} for `{name}` of shape {tuple(parameter.shape)}. Make a new optimizer, or "
                "give this one whenever the number of blocks changes: `prune_regrow_(layer, optimizer, nnzb=...)`."
            )


def new_moments(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, count: int) -> list[torch.Tensor]:
    """
    `count` rows for each of the moments of `parameter`, in the order of `check_optimizer_state`, as the optimiser
    would begin them.
    """
    return [moment.new_full((count, *moment.shape[1:]), first) for moment, first in _moments(optimizer, parameter)]


@torch.no_grad()
def clear_moments_(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, slots: torch.Tensor) -> None:
    """
    Set every moment of the blocks in `slots` (`torch.int64` of shape `(count,)`) to what it begins at, almost always
    zero (arXiv:2108.06277, section 3).

    Raises:
        TypeError: for optimiser state that cannot be told apart by block.
    """
    for moment, first in _moments(optimizer, parameter):
        write_rows_(moment, slots, first)


def _moments(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> list[tuple[torch.Tensor, float]]:
    """Every moment, and what its rows begin at."""
    check_state_size(optimizer, parameter)
    moments = []
    for name, state in optimizer.state.get(parameter, {}).items():
        if (
            state is None
            or isinstance(state, int | float)
            or (torch.is_tensor(state) and state.numel() == 1 and not state.dim())
        ):
            continue
        if torch.is_tensor(state) and state.is_floating_point() and state.dim() and len(state) == len(parameter):
            moments.append((state, _first_value(optimizer, parameter, name)))
            continue
        received = f"{state.dtype} of shape {tuple(state.shape)}" if torch.is_tensor(state) else type(state).__name__
        raise TypeError(
            f"Optimiser state of a sparse layer must be numbers or floating tensors with one row per block "
            f"({len(parameter)}). Got {name!r}: {received} in {type(optimizer).__name__}. New blocks would inherit "
            "it: use an optimiser with element-wise state, such as AdamW, SGD or Adafactor."
        )
    return moments


def _first_value(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, name: str) -> float:
    if name not in FIRST_VALUES:
        return 0.0
    return float(group_of(optimizer, parameter).get(FIRST_VALUES[name], 0.0))


def group_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Any]:
    """The settings of `parameter`."""
    (group,) = (group for group in optimizer.param_groups if any(parameter is own for own in group["params"]))
    return group


def unwrapped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimiser itself, which accelerate wraps."""
    inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return inner

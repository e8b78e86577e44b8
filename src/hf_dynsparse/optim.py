"""
What sparse training asks of an optimiser: parameter groups, clean moments for new blocks, group lasso, a learning
rate for a sparsity.
"""

import math
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from .nn import sparse_layers
from .shards import local_rows, write_rows_


def sparse_learning_rate(dense_learning_rate: float, sparsity: float) -> float:
    """
    Scale the learning rate tuned for a dense model: `lr * exp(1.969 s² + 0.2905 s)` (arXiv:2108.06277, appendix on the
    learning rate). The factor is 6.40 at s = 0.9.
    """
    return dense_learning_rate * math.exp(1.969 * sparsity**2 + 0.2905 * sparsity)


def parameter_groups(
    model: nn.Module,
    weight_decay: float = 0.01,
    dense_learning_rate: float | None = None,
    decayed: Collection[str] | None = None,
) -> list[dict[str, Any]]:
    """
    The trained parameters of `model` for an optimiser: `values` of sparse layers, marked `"per_block": True`, and the
    dense rest, each with and without weight decay; no group is empty.

    Args:
        dense_learning_rate (`float`, *optional*): learning rate of the dense rest: embeddings, norms, biases, head. By
            default that of the optimiser.
        decayed (`Collection[str]`, *optional*): names of the parameters with weight decay. By default all of two or
            more dimensions: no biases, no norms.
    """
    if decayed is None:
        decayed = {name for name, parameter in model.named_parameters() if parameter.dim() > 1}
    values = {layer.values for layer in sparse_layers(model).values()}
    groups = []
    for per_block in (True, False):
        for decays in (True, False):
            parameters = [
                parameter
                for name, parameter in model.named_parameters()
                if parameter.requires_grad and (parameter in values, name in decayed) == (per_block, decays)
            ]
            group = {"params": parameters, "weight_decay": weight_decay if decays else 0.0, "per_block": per_block}
            if dense_learning_rate is not None and not per_block:
                group["lr"] = dense_learning_rate
            groups += [group] if parameters else []
    return groups


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
    (group,) = (group for group in optimizer.param_groups if any(parameter is own for own in group["params"]))
    return float(group.get(FIRST_VALUES[name], 0.0))


@torch.no_grad()
def group_lasso_(values: torch.Tensor, learning_rate: float, strength: float, weight_std: float = 0.02) -> None:
    """
    Decoupled group lasso: shrink each block towards zero by a step of fixed length (arXiv:2108.06277, appendix).

    `w -= lr * strength * weight_std * sqrt(B) * w / sqrt(sum of w² over the block + 1e-6)`; for a rectangular block
    `B` is the side of the square of equal area.

    Args:
        values (`torch.Tensor` of shape `(nnzb, rows, columns)`): changed in place.
    """
    values, _ = local_rows(values)
    side = math.sqrt(values.shape[1] * values.shape[2])
    norm = values.square().sum((1, 2), keepdim=True).add_(1e-6).sqrt_()
    values.sub_(values / norm, alpha=learning_rate * strength * weight_std * math.sqrt(side))

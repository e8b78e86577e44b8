"""Distillation of layers: which hidden states of a student are compared with its teacher's, and how."""

import re
from collections.abc import Sequence
from typing import Any

import torch


def hidden_state_loss(
    student: torch.Tensor, teacher: torch.Tensor, attention_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """
    How far the student's hidden states are from the teacher's: at each token the mean square of their difference over
    the variance of the teacher's, so that all layers and tokens count alike; 1 is what a constant would reach. Padding
    is left out. Each sequence counts alike: splitting a batch into micro-batches changes nothing.

    Args:
        student, teacher (`torch.Tensor` of shape `(batch, sequence, hidden_size)`): states of one layer.
        attention_mask (`torch.Tensor` of shape `(..., sequence)`, *optional*): 0 for padding.

    Returns:
        `torch.Tensor`: a number, in float32.
    """
    student, teacher = student.float(), teacher.float()
    variance = teacher.var(-1, correction=0).clamp(min=torch.finfo(torch.float32).tiny)
    errors = (student - teacher).square().mean(-1) / variance  # [batch, sequence]
    if attention_mask is None:
        return errors.mean()
    real = attention_mask.reshape(errors.shape) != 0  # of several choices the first two dimensions are one
    return (errors.masked_fill(~real, 0.0).sum(1) / real.sum(1).clamp(min=1)).mean()


def hidden_states_loss(
    student: Sequence[torch.Tensor],
    teacher: Sequence[torch.Tensor],
    layers: str,
    attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """The mean of [`hidden_state_loss`] over `layers`, see [`chosen_layers`], of all states: embeddings first."""
    chosen = chosen_layers(layers, len(teacher) - 1)
    losses = [hidden_state_loss(student[layer], teacher[layer], attention_mask) for layer in chosen]
    return torch.stack(losses).mean()


def chosen_layers(layers: str, count: int) -> list[int]:
    """`"all"` of `count` layers, or those of a list such as `"2,4,6"`; 0 are the embeddings."""
    return list(range(1, count + 1)) if layers == "all" else [int(layer) for layer in layers.split(",")]


def check_layers(layers: str | None, weight: float, prefix: str) -> None:
    """
    Args:
        prefix (`str`): what the names of these arguments begin with, where they were given.

    Raises:
        ValueError: for layers that are no list of numbers, or a weight that is not positive.
    """
    if layers is not None and not re.fullmatch(r"all|\d+(,\d+)*", layers):
        raise ValueError(f"`{prefix}layers` must be all, or a list such as 2,4,6. Got {layers!r}.")
    if not weight > 0.0:
        raise ValueError(f"`{prefix}layers_weight` must be positive. Got {weight}. Choose 1, or leave out the layers.")


def check_same_layers(student: Any, teacher: Any, layers: str) -> None:
    """
    Refuse, by their configurations, models whose layers do not correspond.

    Raises:
        ValueError: if they differ in width or number of layers, or have fewer than `layers` name.
    """
    for name in ("hidden_size", "num_hidden_layers"):
        ours, theirs = (getattr(model.config, name, None) for model in (student, teacher))
        if ours != theirs:
            raise ValueError(
                f"Layers are compared one by one: teacher and student must have the same `{name}`. Got {theirs} and "
                f"{ours}. Take a teacher of the student's size, or leave out `distillation_layers`."
            )
    count = getattr(teacher.config, "num_hidden_layers", None)
    if count is not None and max(chosen_layers(layers, count)) > count:
        raise ValueError(f"`distillation_layers` must be at most {count}, as the models have layers. Got {layers}.")

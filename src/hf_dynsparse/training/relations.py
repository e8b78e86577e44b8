"""Distillation of attention: how queries, keys and values of one layer relate to each other, whatever their width."""

import math
import re
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


# What architectures call the three projections of an attention.
PROJECTIONS = (
    ("query", "key", "value"),
    ("q_proj", "k_proj", "v_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("query_proj", "key_proj", "value_proj"),
    ("q", "k", "v"),
)


def relation_loss(
    student: torch.Tensor, teacher: torch.Tensor, heads: int, attention_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """
    How far the relations among the student's vectors are from those among the teacher's: `KL(teacher || student)` of
    `softmax(A A' / sqrt(width / heads))` for each relation head and token, the mean over them (arXiv:2012.15828,
    section 3.1). Padding is left out on both sides. Each sequence counts alike.

    Args:
        student, teacher (`torch.Tensor` of shape `(batch, sequence, width)`): queries, keys or values. Widths may
            differ.
        heads (`int`): relation heads into which vectors are split, whatever the heads of the models.
        attention_mask (`torch.Tensor` of shape `(..., sequence)`, *optional*): 0 for padding.

    Returns:
        `torch.Tensor`: a number, in float32.
    """
    real = torch.ones(teacher.shape[:2], dtype=torch.bool, device=teacher.device)
    if attention_mask is not None:
        real = attention_mask.reshape(real.shape) != 0
    ours, theirs = (_log_relations(vectors, heads, real) for vectors in (student, teacher))
    errors = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1).mean(1)  # [batch, sequence]
    return (errors.masked_fill(~real, 0.0).sum(1) / real.sum(1).clamp(min=1)).mean()


def _log_relations(vectors: torch.Tensor, heads: int, real: torch.Tensor) -> torch.Tensor:
    split = vectors.float().unflatten(-1, (heads, -1)).transpose(1, 2)  # [batch, heads, sequence, width / heads]
    scores = split @ split.transpose(-1, -2) / math.sqrt(split.shape[-1])
    return F.log_softmax(scores.masked_fill(~real[:, None, None], torch.finfo(scores.dtype).min), -1)


class Relations:
    """
    What one attention of a student is to learn from one of a teacher: the sum of [`relation_loss`] over queries, keys
    and values, as the projections give them. Attention weights are not needed, so that any attention kernel will do.

    Args:
        student, teacher (`nn.Module`): models, each of whose attentions has its three projections as layers.
        layers (`str`): see [`chosen_pair`].
        heads (`int`, *optional*): relation heads. Default: attention heads of the teacher.

    Raises:
        ValueError: for a model without such projections or without that layer, or heads that divide no width.
    """

    def __init__(self, student: Any, teacher: Any, layers: str, heads: int | None) -> None:
        ours, theirs = chosen_pair(layers)
        chosen = _projections(student, ours), _projections(teacher, theirs)
        self.heads = heads or int(teacher.config.num_attention_heads)
        for width in {layer.out_features for layers in chosen for layer in layers}:
            if width % self.heads:
                raise ValueError(
                    "`distillation_relation_heads` must divide the width of queries, keys and values. Got "
                    f"{self.heads} for {width}. Give another number."
                )
        self._given: list[dict[int, torch.Tensor]] = [{}, {}]  # by student and teacher: kind -> last output
        for given, projections in zip(self._given, chosen, strict=True):
            for kind, projection in enumerate(projections):
                projection.register_forward_hook(partial(_keep, given, kind))

    def loss(self, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """Of the last forward pass of both models."""
        ours, theirs = ([given.pop(kind) for kind in range(3)] for given in self._given)
        if torch.is_grad_enabled() and not any(vectors.requires_grad for vectors in ours):
            raise ValueError(
                "`distillation_relations` need gradients of queries, keys and values. Got none: they are frozen, or "
                "computed by reentrant checkpointing. Leave that out, or give gradient_checkpointing_kwargs "
                '{"use_reentrant": false}.'
            )
        parts = [relation_loss(*both, self.heads, attention_mask) for both in zip(ours, theirs, strict=True)]
        return torch.stack(parts).sum()


def _keep(given: dict[int, torch.Tensor], kind: int, module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
    given[kind] = output


def _projections(model: Any, layer: int | None) -> list[Any]:
    """Query, key and value of one attention of `model`: number `layer` in its order from 1 on, or the last."""
    children = [dict(module.named_children()) for module in model.modules()]
    found = [[own[name] for name in names] for own in children for names in PROJECTIONS if own.keys() >= set(names)]
    if not found:
        raise ValueError(
            "`distillation_relations` are those of attentions whose query, key and value are layers of their own. Got "
            f"{type(model).__name__}, which has none. Leave them out."
        )
    if (layer or 1) > len(found):
        raise ValueError(
            f"`distillation_relations` must be at most {len(found)}, as {type(model).__name__} has attentions. Got "
            f"{layer}."
        )
    return found[-1 if layer is None else layer - 1]


def chosen_pair(layers: str) -> tuple[int | None, int | None]:
    """Layers of student and teacher, from 1 on: `"last"` of both (`None`), `"4"` of both, or `"6:11"`."""
    ours, _, theirs = layers.partition(":")
    first, second = (None if each == "last" else int(each) for each in (ours, theirs or ours))
    return first, second


def check_relations(relations: str | None, relations_weight: float, relation_heads: int | None, prefix: str) -> None:
    """
    Args:
        prefix (`str`): what the names of these arguments begin with, where they were given.

    Raises:
        ValueError: for relations that name no layer, or numbers that are not positive.
    """
    if relations is not None and not re.fullmatch(r"(last|[1-9]\d*)(:(last|[1-9]\d*))?", relations):
        raise ValueError(
            f"`{prefix}relations` must name a layer: last, one such as 4, or those of student and teacher such as "
            f"6:11. Got {relations!r}."
        )
    if not relations_weight > 0.0:
        raise ValueError(
            f"`{prefix}relations_weight` must be positive. Got {relations_weight}. Choose 1, or leave out relations."
        )
    if relation_heads is not None and relation_heads < 1:
        raise ValueError(f"`{prefix}relation_heads` must be at least 1. Got {relation_heads}.")

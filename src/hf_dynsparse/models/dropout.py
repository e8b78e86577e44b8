"""Seeded dropout for a whole model: its dropout modules, and the dropout inside attention."""

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from .._transformers import sdpa_attention_forward, sdpa_mask
from ..ops.dropout import dropout as seeded
from .position_bias import SUFFIX, bias_of, keep_in_force_, register_biased


ATTENTION = "sdpa_seeded_dropout"

# Whose attention `attention_forward` computes: every head has its own keys and values, and no cache.
MODEL_TYPES = ("bert", "dynsparse_bert")


class SeededDropout(nn.Dropout):
    """`torch.nn.Dropout` by a hash instead of a serial generator where the CPU kernels support it."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """`input` of any shape, with entries zeroed with probability `p` while training."""
        return seeded(input, self.p, self.training)


def set_dropout_(model: nn.Module, p: float) -> None:
    """
    Let all dropout of a model, that inside attention too, have probability `p` from now on, in place. What its
    configuration says stays, and is saved.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = p
        for name in ("attention_dropout", "attn_dropout", "dropout", "dropout_prob"):
            if type(vars(module).get(name)) is float:  # where attention or its output keeps the number itself
                setattr(module, name, p)


def attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """
    Scaled dot product attention with seeded dropout of the weights; without dropout, transformers' own `sdpa`.

    Args:
        query, key, value (`torch.Tensor` of shape `(batch, heads, tokens, head_size)`).
        attention_mask (`torch.Tensor` broadcast to `(batch, heads, tokens, tokens)`, *optional*): `True` where a query
            may look; or numbers to add to the scores.

    Returns:
        `torch.Tensor` of shape `(batch, tokens, heads, head_size)`, and `None` for the weights.
    """
    if dropout == 0.0:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=0.0, scaling=scaling, **kwargs
        )
    scores = (query * (query.shape[-1] ** -0.5 if scaling is None else scaling)) @ key.transpose(2, 3)
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    weights = seeded(scores.softmax(dim=-1), dropout)
    return (weights @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, attention_forward)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
register_biased(ATTENTION)


def seed_dropout_(model: nn.Module) -> int:
    """
    Draw the dropout masks of `model` by a hash, in place: as random as PyTorch's, other draws, ten times as fast on a
    CPU and without a stored mask. Elsewhere it stays PyTorch's.

    Returns:
        `int`: modules changed: those with a probability above 0, and a BERT's `sdpa` attention.
    """
    changed = 0
    for module in model.modules():
        if type(module) is nn.Dropout and module.p > 0:
            module.__class__ = SeededDropout  # keeps its place, hooks and mode
            changed += 1
    if (
        isinstance(model, PreTrainedModel)
        and model.config.model_type in MODEL_TYPES
        and model.config._attn_implementation in ("sdpa", f"sdpa{SUFFIX}")
        and model.config.attention_probs_dropout_prob > 0
    ):
        model.set_attn_implementation(ATTENTION)
        if bias_of(model) is not None:
            keep_in_force_(model.base_model)
        changed += 1
    return changed

"""Losses that are 0, not NaN, where a batch has nothing to predict."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn import functional as F


# The cross-entropy of each row, 0 where the label does not count, of logits `(rows, classes)` and labels `(rows,)`.
RowLosses = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


IGNORED = -100  # a label that does not count

# Inputs of the heads of transformers that a loss is computed from.
LABELS = ("labels", "next_sentence_label", "start_positions", "end_positions")


def token_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    row_losses: RowLosses | None = None,
) -> torch.Tensor:
    """
    Cross-entropy over the labels that count: their mean, or their sum divided by `num_items_in_batch`. If none counts
    it is 0 and has a graph, so that backward gives zeros to all parameters and no rank of a distributed run waits.

    Args:
        logits (`torch.Tensor` of shape `(..., classes)`).
        labels (`torch.Tensor` of shape `(...)`): classes, or -100.
        num_items_in_batch (`int`, *optional*): labels that count in all micro-batches and ranks.
        row_losses (`Callable`, *optional*): what computes them in the place of PyTorch.
    """
    logits, labels = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    if row_losses is not None:
        count = (labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        return row_losses(logits, labels).sum() / at_least_one(count)
    if num_items_in_batch is None:
        return zero_if_unlabelled(F.cross_entropy(logits, labels, ignore_index=IGNORED), labels)
    total = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    return total / at_least_one(num_items_in_batch)


def span_loss(logits: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """
    Cross-entropy of the first, or the last, token of answers: as in transformers, positions outside of the sequence do
    not count.

    Args:
        logits (`torch.Tensor` of shape `(batch_size, sequence_length)`).
        positions (`torch.Tensor` of shape `(batch_size,)` or `(batch_size, 1)`).
    """
    length = logits.shape[1]
    positions = positions.reshape(-1).clamp(0, length)
    return token_loss(logits, positions.where(positions < length, IGNORED))


def zero_if_unlabelled(loss: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """`loss`, a mean over the labels that count; 0 with its graph if none does."""
    return loss.where((labels != IGNORED).any(), 0.0)


def at_least_one(count: torch.Tensor | int) -> torch.Tensor | int:
    """A number to divide by: a sum over nothing is 0, whatever divides it."""
    return count.clamp(min=1) if isinstance(count, torch.Tensor) else max(count, 1)


def class_labels(inputs: Mapping[str, Any]) -> torch.Tensor | None:
    """The labels of a batch, if they are classes and all that its loss is computed from."""
    labels = inputs.get("labels")
    if not isinstance(labels, torch.Tensor) or labels.is_floating_point():
        return None
    return None if any(name in inputs for name in LABELS if name != "labels") else labels

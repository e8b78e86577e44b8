"""Text without labels to distil on, among rows that have some."""

import math

import torch
from datasets import Dataset, concatenate_datasets


UNLABELLED = -1  # the class of a row without one, as in the test sets of GLUE on the Hub; of numbers it is NaN


def with_transfer_set(train: Dataset, rows: Dataset) -> Dataset:
    """
    `train`, and then `rows` without labels (a transfer set, arXiv:1908.08962, section 3). While it trains, the answers
    of a teacher take their place: see [`~training.distillation.Distillation.completed`].

    Args:
        train (`Dataset`): token ids, and `labels` for a sequence each: classes or numbers.
        rows (`Dataset`): token ids.
    """
    features = train.features
    missing = UNLABELLED if "int" in features["labels"].dtype else math.nan
    inputs = rows.select_columns([name for name in train.column_names if name != "labels"])
    unlabelled = inputs.add_column("labels", [missing] * len(rows))
    return concatenate_datasets([train, unlabelled.select_columns(train.column_names).cast(features)])


def is_unlabelled(labels: torch.Tensor) -> torch.Tensor:
    """Which of the `labels` of sequences, of any shape, are missing."""
    return labels.isnan() if labels.is_floating_point() else labels == UNLABELLED

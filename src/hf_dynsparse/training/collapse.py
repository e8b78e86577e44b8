"""Runs that ended as a constant: a model that gives one answer, whatever it is asked."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np


logger = logging.getLogger(__name__)

SPREAD = 0.05  # standard deviation of predicted numbers, over that of the labels, under which they are a constant


def is_constant(predictions: Sequence[Any] | np.ndarray, labels: Sequence[Any] | np.ndarray) -> bool:
    """
    Whether predictions for an evaluation set do not depend on its inputs, while its labels do: one class or text for
    all, or numbers that vary by less than a twentieth of what the labels do.

    Args:
        predictions, labels (`Sequence` of length `rows`): classes as whole numbers or texts, or numbers.
    """
    found, truth = np.asarray(predictions), np.asarray(labels)
    if truth.dtype.kind == "f":
        return bool(found.std() < SPREAD * truth.std())
    return len(np.unique(found)) == 1 < len(np.unique(truth))


def warn_of_collapse(args: Any, steps: int, *, is_sparse: bool = True) -> None:
    """
    Say that a run of so many steps with these arguments has ended as a constant, and what to do about it: a dense
    model has no blocks to choose, and one with a teacher may have learned it from there.
    """
    ways = ""
    if args.teacher is not None:
        ways = f" See whether {args.teacher}, its teacher, has collapsed too."
    elif is_sparse:
        ways = (
            " A dense model that is made sparse keeps little by --calibration_samples 0, and learns more from a "
            "--teacher with --distillation_layers all."
        )
    logger.warning(
        "This model gives one answer for the whole evaluation set: the run collapsed, its scores say nothing. Got a "
        "learning rate of %g after a warm-up of %d in %d steps. Give more --num_train_epochs or --warmup_steps, or "
        "lower --learning_rate to a third.%s",
        *(args.learning_rate, args.get_warmup_steps(steps), steps, ways),
    )

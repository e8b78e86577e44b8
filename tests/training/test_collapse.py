"""Runs that ended as a constant: when they count as such, and what is said."""

import logging

import pytest

from hf_dynsparse.training.collapse import is_constant, warn_of_collapse
from tests.toy import toy_arguments


@pytest.mark.parametrize(
    ("predictions", "labels", "constant"),
    [
        ([1, 1, 1, 1], [0, 1, 1, 0], True),
        ([1, 1, 1, 0], [0, 1, 1, 0], False),
        ([1, 1, 1, 1], [1, 1, 1, 1], False),  # there was nothing else to say
        (["", "", ""], ["a", "b", ""], True),
        (["", "a", ""], ["a", "b", ""], False),
        ([2.50, 2.51, 2.52], [0.0, 2.5, 5.0], True),
        ([2.0, 2.5, 3.0], [0.0, 2.5, 5.0], False),
        ([2.0, 2.0, 2.0], [2.0, 2.0, 2.0], False),
    ],
)
def test_a_constant(predictions, labels, constant):
    assert is_constant(predictions, labels) is constant


@pytest.mark.parametrize(
    ("teacher", "is_sparse", "advice"),
    [
        (None, True, "keeps little by --calibration_samples 0"),
        (None, False, "--learning_rate to a third."),
        ("runs/dense", True, "See whether runs/dense, its teacher, has collapsed too."),
    ],
)
def test_the_way_out_is_said(teacher, is_sparse, advice, tmp_path, caplog):
    args = toy_arguments(tmp_path, learning_rate=2e-4, warmup_steps=0.1, teacher=teacher)
    with caplog.at_level(logging.WARNING):
        warn_of_collapse(args, 50, is_sparse=is_sparse)
    (message,) = caplog.messages
    assert "learning rate of 0.0002 after a warm-up of 5 in 50 steps" in message
    assert advice in message
    assert ("--calibration_samples" in message) == (is_sparse and teacher is None)

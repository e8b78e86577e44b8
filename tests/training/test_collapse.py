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


def test_the_way_out_is_said(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        warn_of_collapse(toy_arguments(tmp_path, learning_rate=2e-4, warmup_steps=0.1), 50)
    (record,) = caplog.records
    assert "learning rate of 0.0002 after a warm-up of 5 in 50 steps" in record.getMessage()

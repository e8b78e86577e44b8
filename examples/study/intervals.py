"""The mean of a few numbers, and how well they tell it."""

import math
from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

import numpy as np


# 97.5 % quantile of Student's t for 1, 2, ... degrees of freedom. For more than 20 the last one: a little too wide.
T_QUANTILES = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
)


class Interval(NamedTuple):
    """
    A mean and its 95 % interval.

    Args:
        mean (`float`): of the numbers.
        low, high (`float`, *optional*): the ends; `None` of a single number.
        count (`int`): how many numbers.
    """

    mean: float
    low: float | None
    high: float | None
    count: int

    @property
    def half(self) -> float:
        """Half its width; 0 of a single number."""
        return 0.0 if self.low is None or self.high is None else (self.high - self.low) / 2


def confidence_interval(numbers: Sequence[float]) -> Interval:
    """
    The mean of one or more numbers, and the interval that holds the true one in 95 % of cases if they are normal:
    `mean ± t s / sqrt(n)`, `s` their standard deviation, `t` of Student's distribution of `n - 1` degrees of freedom.

    Example:
        ```python
        >>> confidence_interval([0.1, 0.2, 0.3])  # 0.2 ± 4.303 * 0.1 / sqrt(3)
        Interval(mean=0.2, low=-0.048..., high=0.448..., count=3)
        ```
    """
    mean, count = fmean(numbers), len(numbers)
    if count == 1:
        return Interval(mean, None, None, 1)
    half = T_QUANTILES[min(count - 1, len(T_QUANTILES)) - 1] * float(np.std(numbers, ddof=1)) / math.sqrt(count)
    return Interval(mean, mean - half, mean + half, count)

"""95 % confidence intervals: of proportions, of means, and of ratios of sums."""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_NORMAL_95 = 1.959963984540054  # 97.5 % quantile of the standard normal distribution
# 97.5 % quantiles of Student's t for 1 to 30 degrees of freedom (Abramowitz and Stegun, table 26.10). Beyond them the
# last one: its interval is then too wide, by 4 % at most.
_T_95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


class Interval(NamedTuple):
    low: float
    high: float


def wilson_interval(num_right: float, num: int) -> Interval:
    """The 95 % score interval of a proportion (Wilson 1927): sound at 0, at 1 and for few samples, unlike p +- 2 s.

    `num_right` may hold fractions of samples: a mark in [0, 1] with mean p varies by at most p (1 - p), so that the
    interval is then too wide, if anything.
    """
    p, z2 = num_right / num, _NORMAL_95**2
    middle = (p + z2 / (2 * num)) / (1 + z2 / num)
    half = _NORMAL_95 / (1 + z2 / num) * math.sqrt(p * (1 - p) / num + z2 / (4 * num**2))
    return Interval(min(p, max(0.0, middle - half)), max(p, min(1.0, middle + half)))  # p is within, rounded or not


def t_interval(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    """The mean of values and the ends of its 95 % interval by Student's t, which one value alone has not."""
    num = len(values)
    mean = sum(values) / num
    if num < 2:
        return mean, None, None
    half = _half(sum((value - mean) ** 2 for value in values), num)
    return mean, mean - half, mean + half


def least_to_reach(share: float) -> int:
    """The fewest samples of which, all of them right, the interval begins at this share or above it."""
    return next(num for num in itertools.count(1) if wilson_interval(num, num).low >= share)


class Ratios:
    """Sums over rows divided by sizes summed over rows, F of them at once, in memory of a few numbers each.

    Intervals are over rows: those of a ratio estimator (Cochran 1977, Sampling Techniques, section 2.11) with Student's
    t; with equal sizes it is `t_interval` of the rows' own ratios. A row of size 0 has no part in a ratio. Deviations
    are summed from the means so far (Welford 1962, Technometrics 4), so that no digits are lost between large sums.
    """

    def __init__(self, num: int) -> None:
        self.num_rows = np.zeros(num, dtype=np.int64)  # (F,) that have a part
        self._totals = np.zeros((2, num))  # of sums and of sizes
        self._squares = np.zeros((3, num))  # deviations of sums squared, times those of sizes, of sizes squared

    def add(self, sums: np.ndarray, sizes: np.ndarray) -> None:
        """One row more: sums (F,) and sizes (F,)."""
        has = sizes > 0
        row = np.where(has, np.stack([sums, sizes]), 0.0)
        with np.errstate(invalid="ignore"):  # a diverged model's losses are no numbers
            before = np.where(has, row - self._totals / np.maximum(self.num_rows, 1), 0.0)
            self._totals += row
            self.num_rows += has
            after = np.where(has, row - self._totals / np.maximum(self.num_rows, 1), 0.0)
            self._squares += [before[0] * after[0], before[0] * after[1], before[1] * after[1]]

    def size(self, index: int) -> float:
        """The sizes of all rows together."""
        return float(self._totals[1, index])

    def interval(self, index: int) -> tuple[float, float | None, float | None]:
        """A ratio and the ends of its 95 % interval, which one row, or what is not finite, has not."""
        num = int(self.num_rows[index])
        total, size = map(float, self._totals[:, index])
        ratio = total / size
        if num < 2 or not math.isfinite(ratio):
            return ratio, None, None
        of_sums, of_both, of_sizes = map(float, self._squares[:, index])
        squares = max(0.0, of_sums - 2 * ratio * of_both + ratio**2 * of_sizes)
        half = _half(squares, num) * num / size
        return ratio, ratio - half, ratio + half


def _half(squares: float, num: int) -> float:
    """Half the interval of a mean of `num` values with this sum of squared deviations."""
    return float(_T_95[min(num - 1, len(_T_95)) - 1] * math.sqrt(squares / (num - 1) / num))

"""A number's own history: what is usual for it, and whether a value stands out."""

import math
from bisect import bisect_left, insort
from collections import deque
from itertools import pairwise

SIGMA = 1.4826  # a normal distribution's standard deviation, in units of its median absolute deviation
RECENT = 10  # values
LEAST = 20  # values, before anything can stand out
Z = 6.0  # robust deviations by which a value stands out


class History:
    """The last finite values of a number, with robust statistics.

    Args:
        window: the number of values that are kept.
        least: the number of values from which on `is_known` is true.
    """

    def __init__(self, window: int = 100, least: int = LEAST) -> None:
        self.values: deque[float] = deque(maxlen=window)
        self.least = least
        self._sorted: list[float] = []

    def add(self, value: float) -> None:
        """Add a value. One that is not finite is left out."""
        if not math.isfinite(value):
            return
        if len(self.values) == self.values.maxlen:
            del self._sorted[bisect_left(self._sorted, self.values[0])]
        self.values.append(value)
        insort(self._sorted, value)

    def __len__(self) -> int:
        return len(self.values)

    @property
    def is_known(self) -> bool:
        """Whether there are enough values to judge another one."""
        return len(self.values) >= self.least

    @property
    def median(self) -> float:
        """The median; NaN without values."""
        return _middle(self._sorted)

    @property
    def largest(self) -> float:
        """The largest value; minus infinity without values."""
        return self._sorted[-1] if self._sorted else -math.inf

    @property
    def smallest(self) -> float:
        """The smallest value; infinity without values."""
        return self._sorted[0] if self._sorted else math.inf

    def zscore(self, value: float) -> float:
        """Return how many robust standard deviations (each at least 0.1% of the median) a value is above the median."""
        median = self.median
        deviation = _middle(sorted(abs(each - median) for each in self._sorted))
        return (value - median) / max(SIGMA * deviation, 1e-3 * abs(median), 1e-12)

    @property
    def recent_largest(self) -> float:
        """The largest of the last values."""
        return max(list(self.values)[-RECENT:], default=-math.inf)

    def stands_out(self, value: float) -> bool:
        """Whether a value is far above the recent ones: above their largest by 5%, and by Z times the roughness.

        The roughness is the robust deviation of a value from its neighbours: a trend does not count. What is not finite
        does not stand out; without enough history, nothing does.
        """
        recent = self.recent_largest
        if not self.is_known or not recent + 0.05 * abs(self.median) < value < math.inf:
            return False
        steps = sorted(abs(two - one) for one, two in pairwise(self.values))
        return value > recent + Z * SIGMA * _middle(steps) / math.sqrt(2)


def _middle(ordered: list[float]) -> float:
    half = len(ordered) // 2
    if not ordered:
        return math.nan
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2

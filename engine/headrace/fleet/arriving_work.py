"""How fast work comes to a pool, by the samples of its history. Pure."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence

from headrace.fleet.scaling_spec import PoolSample

COVERED = 0.7
"""Share of a window that samples must span before it tells a rate."""


class ArrivingWork:
    """Of one history, believed. A rate costs O(log samples)."""

    def __init__(self, samples: Sequence[PoolSample]) -> None:
        """Samples that do not know the work, or are not later than the one before, are passed over."""
        self._at_s: list[float] = []
        self._work_s: list[float] = []
        for sample in samples:
            if sample.arrived_work_s is not None and (not self._at_s or sample.at_s > self._at_s[-1]):
                self._at_s.append(sample.at_s)
                self._work_s.append(sample.arrived_work_s)

    def rate(self, from_s: float, until_s: float, covered: float = COVERED) -> float | None:
        """Replica-seconds of work per second between two moments; None where samples span less than `covered` of
        the time between."""
        first = bisect_left(self._at_s, from_s)
        last = bisect_right(self._at_s, until_s) - 1
        if last <= first or self._at_s[last] - self._at_s[first] < covered * (until_s - from_s):
            return None
        work_s = self._work_s[last] - self._work_s[first]
        return max(0.0, work_s) / (self._at_s[last] - self._at_s[first])

    def trend(self, until_s: float, window_s: float) -> float:
        """By how much the rate grows per second: the smaller of the two steps between three windows that follow each
        other, so that a burst within the last one is no trend. 0 where it does not grow, or nobody can tell."""
        rates = [self.rate(until_s - (back + 1) * window_s, until_s - back * window_s) for back in (2, 1, 0)]
        first, second, third = rates
        if first is None or second is None or third is None:
            return 0.0
        return max(0.0, min(second - first, third - second)) / window_s

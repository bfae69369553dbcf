"""Scalers that take one step at a time: once an interval one replica more, one fewer, or neither, by what each holds.

Nothing is decided while the fleet changes. What waits in the gateway is spread over the replicas, where it would wait
without one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

from headrace_bench.scaling_sample import Bounds, FleetSample


class Held(NamedTuple):
    """By one ready replica."""

    kv_use: float  # 0..1
    waiting: float  # requests, its share of the gateway's included


class OneByOne(ABC):
    """Says when to step; which way is its heir's to say."""

    def __init__(self, bounds: Bounds, interval_s: float) -> None:
        self._bounds = bounds
        self._interval_s = interval_s
        self._ran_s = float("-inf")
        self._target = 0

    def target(self, sample: FleetSample) -> int:
        if not self._target:
            self._target = sample.current
        if sample.at_s - self._ran_s < self._interval_s - 1e-9:
            return self._target
        self._ran_s = sample.at_s
        if sample.starting or sample.ready != self._target or not sample.replicas:
            return self._target
        share = sample.held / sample.ready
        step = self._step([Held(one.kv_use, one.waiting + share) for one in sample.replicas])
        if step:
            self._target = self._bounds.clip(sample.ready + step)
        return self._target

    @abstractmethod
    def _step(self, held: Sequence[Held]) -> int:
        """1, -1 or 0. `held` is not empty."""

"""Knative's pod autoscaler on concurrency.

knative/serving, pkg/autoscaler/scaling/autoscaler.go (`Scale`) and the defaults of config/core/configmaps/autoscaler:
every 2 s; stable window 60 s, panic window 6 s; panic once the panic window asks for twice what is ready, until 60 s
after it last did, and never down meanwhile; 70% of the target concurrency; up 1000-fold at most, down to a half;
scale-down delay 0. The target concurrency is 100 where nobody sets it.
"""

from __future__ import annotations

from collections import deque
from math import ceil, floor
from typing import NamedTuple

from headrace_bench.scaling_sample import FleetSample


class KpaSpec(NamedTuple):
    """Defaults of the config map; times in seconds."""

    target: float = 100.0  # concurrent requests per pod
    utilisation: float = 0.7  # of it
    tick_s: float = 2.0
    stable_s: float = 60.0
    panic_s: float = 6.0
    panic_threshold: float = 2.0
    max_up_rate: float = 1000.0
    max_down_rate: float = 2.0
    down_delay_s: float = 0.0


DEFAULT = KpaSpec()


class Kpa:
    """One revision."""

    def __init__(self, spec: KpaSpec = DEFAULT) -> None:
        self._spec = spec
        self._seen: deque[tuple[float, int]] = deque()  # concurrency, each second
        self._delayed: deque[tuple[float, int]] = deque()
        self._panic_since_s: float | None = None
        self._most_panic = 0
        self._ticked_s = float("-inf")
        self._target = 0

    def target(self, sample: FleetSample) -> int:
        spec, now_s = self._spec, sample.at_s
        seen = self._seen
        seen.append((now_s, sample.concurrency))
        while seen[0][0] <= now_s - spec.stable_s:
            seen.popleft()
        if now_s - self._ticked_s < spec.tick_s - 1e-9:
            return self._target
        self._ticked_s = now_s
        stable = _mean(seen, now_s - spec.stable_s)
        panic = _mean(seen, now_s - spec.panic_s)
        self._target = self._late(self._scaled(stable, panic, max(1, sample.ready), now_s), now_s)
        return self._target

    def _scaled(self, stable: float, panic: float, ready: int, now_s: float) -> int:
        spec = self._spec
        per_pod = spec.target * spec.utilisation
        most, least = ceil(spec.max_up_rate * ready), floor(ready / spec.max_down_rate)
        by_stable = min(max(ceil(stable / per_pod - 1e-9), least), most)
        wanted = ceil(panic / per_pod - 1e-9)
        by_panic = min(max(wanted, least), most)
        if wanted / ready >= spec.panic_threshold:
            self._panic_since_s = now_s
        elif self._panic_since_s is not None and self._panic_since_s + spec.stable_s < now_s:
            self._panic_since_s, self._most_panic = None, 0
        if self._panic_since_s is None:
            return by_stable
        self._most_panic = max(self._most_panic, by_stable, by_panic)
        return self._most_panic

    def _late(self, wanted: int, now_s: float) -> int:
        """The highest of the scale-down delay."""
        if not self._spec.down_delay_s:
            return wanted
        delayed = self._delayed
        delayed.append((now_s, wanted))
        while delayed[0][0] <= now_s - self._spec.down_delay_s:
            delayed.popleft()
        return max(replicas for _, replicas in delayed)


def _mean(seen: deque[tuple[float, int]], since_s: float) -> float:
    inside = [value for at_s, value in seen if at_s > since_s]
    return sum(inside) / len(inside)

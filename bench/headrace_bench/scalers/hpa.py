"""Kubernetes' HorizontalPodAutoscaler on a metric per pod, autoscaling/v2, with its defaults.

kubernetes/kubernetes, pkg/controller/podautoscaler: `replica_calculator.go` (calcPlainMetricReplicas: the formula, the
tolerance, and that pods which are not ready count as 0 when it would grow), `horizontal.go` (stabilisation and rate
policies), defaults of pkg/apis/autoscaling/v2/defaults.go and of the controller manager: every 15 s, tolerance 0.1, up
by 4 pods or 100% in 15 s, whichever is more, and at once; down to the highest recommendation of the last 300 s.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from math import ceil
from typing import NamedTuple

from headrace_bench.scaling_sample import Bounds, FleetSample

Metric = Callable[[FleetSample], float]
"""Of the whole fleet; the target is per pod."""


class HpaSpec(NamedTuple):
    """Seconds, and a share."""

    sync_s: float = 15.0
    tolerance: float = 0.1
    down_stabilisation_s: float = 300.0
    up_pods: int = 4
    up_percent: float = 100.0
    up_period_s: float = 15.0


DEFAULT = HpaSpec()


class Hpa:
    """`metric` summed over the fleet, held at `target` per ready pod."""

    def __init__(self, metric: Metric, target: float, bounds: Bounds, spec: HpaSpec = DEFAULT) -> None:
        self._metric = metric
        self._per_pod = target
        self._bounds = bounds
        self._spec = spec
        self._recommended: deque[tuple[float, int]] = deque()
        self._grown: deque[tuple[float, int]] = deque()  # (when, pods added)
        self._synced_s = float("-inf")
        self._target = 0

    def target(self, sample: FleetSample) -> int:
        if sample.at_s - self._synced_s < self._spec.sync_s - 1e-9:
            return self._target
        self._synced_s = sample.at_s
        self._target = self._limited(self._stabilised(self._desired(sample), sample), sample)
        return self._target

    def _desired(self, sample: FleetSample) -> int:
        """calcPlainMetricReplicas."""
        if not sample.ready:
            return sample.current
        ratio = self._metric(sample) / sample.ready / self._per_pod
        if not (sample.starting and ratio > 1.0):
            if self._is_near(ratio):
                return sample.current
            return ceil(ratio * sample.ready - 1e-9)
        # Pods that are not ready count as using nothing.
        ratio = self._metric(sample) / sample.current / self._per_pod
        if self._is_near(ratio) or ratio < 1.0:
            return sample.current
        return ceil(ratio * sample.current - 1e-9)

    def _is_near(self, ratio: float) -> bool:
        return 1.0 - self._spec.tolerance <= ratio <= 1.0 + self._spec.tolerance

    def _stabilised(self, desired: int, sample: FleetSample) -> int:
        """stabilizeRecommendationWithBehaviors: no window up, the highest of the window down."""
        recent = self._recommended
        while recent and recent[0][0] < sample.at_s - self._spec.down_stabilisation_s:
            recent.popleft()
        recent.append((sample.at_s, desired))
        if desired >= sample.current:
            return desired
        return min(sample.current, max(replicas for _, replicas in recent))

    def _limited(self, desired: int, sample: FleetSample) -> int:
        """convertDesiredReplicasWithBehaviorRate, upwards; downwards 100% may go in 15 s."""
        spec, now = self._spec, sample.current
        desired = self._bounds.clip(desired)
        while self._grown and self._grown[0][0] <= sample.at_s - spec.up_period_s:
            self._grown.popleft()
        if desired <= now:
            return desired
        began = now - sum(added for _, added in self._grown)
        most = max(began + spec.up_pods, ceil(began * (1 + spec.up_percent / 100)))
        target = max(now, min(desired, most))
        if target > now:
            self._grown.append((sample.at_s, target - now))
        return target


def queue_length(sample: FleetSample) -> float:
    """Requests that wait, in engines and in the gateway."""
    return float(sample.queued)


def concurrency(sample: FleetSample) -> float:
    """Requests that wait or run."""
    return float(sample.concurrency)
